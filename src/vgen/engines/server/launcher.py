"""Starts a vLLM server with the command line and environment that the rest of vgen relies on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..._addresses import free_port
from ...errors import EngineError, MissingExtraError
from ..server_api import EXTENSION, KEY_FILE_VARIABLE
from . import parent_watchdog
from .server_folder import ServerFolder
from .server_process import INSTANCE_VARIABLE, KEY_FILE, ServerProcess, trusting

CPU_KV_CACHE_BYTES = 1 << 30
"""On a CPU vLLM's default for the KV cache is most of the machine's memory."""
_TORCHRUN = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
"""Variables of a trainer's ranks, by which a server would join the trainer's process group."""


def start_server(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    control_key: str | None = None,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    otlp_traces_endpoint: str | None = None,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    shared_memory_directory: str | Path | None = None,
    log_file: str | Path | None = None,
    wait: bool = True,
    timeout: float = 600.0,
) -> ServerProcess:
    """Start a vLLM server.

        with start_server("Qwen/Qwen3-0.6B", arguments=["--max-model-len", "4096"]) as server:
            print(server.url)

    Args:
        model: A directory or hub name.
        host: Where the server listens.
        port: 0 takes a free port.
        api_key: Guards vLLM's inference routes; None leaves them open.
        control_key: Guards all other routes; None makes a random key.
        tensor_parallel_size: Workers of one engine.
        data_parallel_size: Engines behind the one URL.
        otlp_traces_endpoint: Where the server sends its spans.
        arguments: Further options of vLLM, unchanged. They override vgen's own.
        environment: Variables to add to this process's.
        shared_memory_directory: Where weights travel through shared memory; by default `/dev/shm`.
        log_file: The server's output is appended to it. By default it goes to a file that is deleted with the server.
        wait: Whether to return only once the server is healthy.
        timeout: Seconds to wait for that.

    Raises:
        EngineError: The server did not start, or another process has its port; the message has the end of its log.
            Or no folder for temporary files can be written.
        MissingExtraError: vLLM is not installed.
    """
    _check(model)
    certificate = _value(arguments, "--ssl-certfile")
    tls = None
    if certificate is not None:
        # A server that requires clients to have certificates asks the launcher for one as well.
        mutual = _value(arguments, "--ssl-cert-reqs") == str(int(ssl.CERT_REQUIRED))
        tls = trusting(certificate, _value(arguments, "--ssl-keyfile"), shown=mutual)
    port = free_port(host, port)
    control_key = _header_safe(control_key) if control_key is not None else secrets.token_urlsafe(32)
    folder = ServerFolder()
    key_file = Path(folder.name, KEY_FILE)
    log_path = Path(log_file) if log_file is not None else Path(folder.name, "server.log")
    key_file.touch(mode=0o600)
    key_file.write_text(control_key)
    instance = secrets.token_hex(16)
    variables = server_environment(
        arguments,
        workers=tensor_parallel_size * data_parallel_size,
        api_key=api_key,
        otlp_traces_endpoint=otlp_traces_endpoint,
        shared_memory_directory=shared_memory_directory,
    )
    command = server_command(
        model,
        host=host,
        port=port,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        otlp_traces_endpoint=otlp_traces_endpoint,
        arguments=arguments,
    )
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            env={
                **variables,
                KEY_FILE_VARIABLE: str(key_file),
                **(environment or {}),
                INSTANCE_VARIABLE: instance,
                parent_watchdog.FOLDER_VARIABLE: folder.name,
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # its own process group: it can be ended as a whole, and Ctrl-C does not reach it
        )
    scheme = "http" if tls is None else "https"
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"{scheme}://{f'[{reachable}]' if ':' in reachable else reachable}:{port}"
    server = ServerProcess(process, str(model), url, control_key, log_path, folder, instance, tls)
    if wait:
        try:
            server.wait_until_healthy(timeout)
        except BaseException:
            server.stop()
            raise
    return server


def server_command(
    model: str | Path,
    *,
    host: str,
    port: int,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    otlp_traces_endpoint: str | None = None,
    arguments: Sequence[str] = (),
) -> list[str]:
    """The command line. The caller's `arguments` come last, so that they override the others."""
    # The CPU build has no `vllm` command. And this module runs one API server process, which can keep the lease.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", host, "--port", str(port)]
    command += ["--middleware", "vgen.engines.server.middleware.ControlMiddleware"]
    command += ["--weight-transfer-config", json.dumps({"backend": "vgen_shm"})]
    command += ["--enable-scale-out", "--enable-per-request-metrics", "--enable-prompt-tokens-details"]
    command += ["--enable-request-id-headers", "--logprobs-mode", "processed_logprobs"]
    command += ["--worker-extension-cls", EXTENSION]
    command += ["--tensor-parallel-size", str(tensor_parallel_size)]
    if data_parallel_size > 1:
        command += ["--data-parallel-size", str(data_parallel_size)]
    if otlp_traces_endpoint:
        command += ["--otlp-traces-endpoint", otlp_traces_endpoint]
    if not _given(arguments, "--disable-uvicorn-access-log"):
        command.append("--disable-uvicorn-access-log")  # a step would log a thousand lines
    if _given(arguments, "--speculative-config") and not _given(arguments, "--sleep-preserve-parameter-names"):
        command += ["--sleep-preserve-parameter-names", "draft.*"]  # no sync brings the draft model's weights back
    if on_cpu():
        if not _compiles(arguments):
            command.append("--enforce-eager")
        if not _given(arguments, "--kv-cache-memory-bytes", "--gpu-memory-utilization"):
            command += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)]
    return [*command, *arguments]


def server_environment(
    arguments: Sequence[str] = (),
    *,
    workers: int = 1,
    api_key: str | None = None,
    otlp_traces_endpoint: str | None = None,
    shared_memory_directory: str | Path | None = None,
) -> dict[str, str]:
    """The environment of a server: this process's, without torchrun's variables.

    The API key is passed here and not on the command line, which other users can see.
    """
    variables = {name: value for name, value in parent_watchdog.environment().items() if not _TORCHRUN.fullmatch(name)}
    variables |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONUNBUFFERED": "1"}
    variables.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")  # the control key guards that route
    if plugins := variables.get("VLLM_PLUGINS"):
        variables["VLLM_PLUGINS"] = f"{plugins},vgen"
    if api_key is not None:
        variables["VLLM_API_KEY"] = _header_safe(api_key)
    if shared_memory_directory is not None:
        variables["VGEN_SHARED_MEMORY_DIR"] = str(Path(shared_memory_directory).absolute())
    if otlp_traces_endpoint and re.search(r":4318\b|/v1/traces/?$", otlp_traces_endpoint):
        variables.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    if on_cpu() and not _compiles(arguments):
        variables.setdefault("TORCH_COMPILE_DISABLE", "1")  # even an eager engine compiles its sampler
    if on_cpu() and workers > len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))):
        # By default vLLM binds each worker to its own NUMA node, and does not start if there are too few.
        variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    return variables


def on_cpu() -> bool:
    """Whether the installed vLLM is the CPU build, by vLLM's own rule but without importing it."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    for name, mark in (("vllm", "cpu"), ("vllm-cpu", "")):
        with suppress(importlib.metadata.PackageNotFoundError):
            return mark in importlib.metadata.version(name)
    return False


def _check(model: str | Path) -> None:
    """Raise at once for mistakes that would otherwise show only after vLLM was imported."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vgen serve", "vLLM", "vllm' or, without a GPU, 'vgen[cpu")
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="vgen"):
        raise EngineError("vLLM cannot find vgen's plugin: install vgen with pip, which registers it")
    path = Path(model).expanduser()
    if (path.is_absolute() or str(model).startswith((".", "~"))) and not path.exists():
        raise EngineError(f"there is no model at {model}")
    if path.is_dir() and not any(path.glob("*config.json")) and not any(path.glob("params.json")):
        raise EngineError(f"{model} is not a model directory: it has no config.json")


def _header_safe(key: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise ValueError("a key must be printable ASCII without spaces around it")
    return key


def _compiles(arguments: Sequence[str]) -> bool:
    """Whether the caller asks for compilation, which on a CPU takes more time than it saves."""
    short = any(argument.startswith(("-O", "-cc")) for argument in arguments)
    return short or "--no-enforce-eager" in arguments or _given(arguments, "--compilation-config")


def _given(arguments: Sequence[str], *flags: str) -> bool:
    """Whether the caller's arguments hold one of `flags`, in any spelling that vLLM accepts."""
    names = {argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("-")}
    return any(flag in names or flag.replace("--", "--no-", 1) in names for flag in flags)


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of the last `flag` in the caller's arguments, in any spelling that vLLM accepts."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        name, equals, given = argument.partition("=")
        if argument.startswith("-") and name.replace("_", "-") == flag:
            value = given if equals else following
    return value
