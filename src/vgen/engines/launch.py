"""How a vLLM server is started: with everything that the rest of vgen relies on, and so that it always ends."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import EngineError, MissingExtraError
from . import lifeline
from .control import CONTROL_HEADER, EXTENSION, KEY_FILE_VARIABLE

POLL_SECONDS = 0.2
STOP_SECONDS = 30.0
LAST_LINES = 15
CPU_KV_CACHE_BYTES = 1 << 30
"""On a CPU vLLM would otherwise take most of the machine's memory for the KV cache."""
_TORCHRUN = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
"""What a trainer's ranks have in their environment, and a server would take for its own."""
_KEY_FILE = "control-key"
_ERROR = re.compile(r"([\w.]+(Error|Exception)|[\w.]+: error): \S")
_LOG_PREFIX = re.compile(r"^\(\w+ pid=\d+\)\s*((ERROR|WARNING|INFO) [\d-]+ [\d:]+ \[[^\]]*\]\s?)?")


class ServerProcess:
    """A vLLM server in processes of its own. It ends with this process, and as a context manager with the block."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        model: str,
        url: str,
        control_key: str,
        log_file: Path,
        folder: tempfile.TemporaryDirectory[str],
    ) -> None:
        self.process = process
        self.model = model
        self.url = url
        self.control_key = control_key
        """Opens every route that is not inference, in the header `X-Vgen-Control-Key`."""
        self.control_key_file = Path(folder.name, _KEY_FILE)
        """Holds it for others of this user; it goes with the server."""
        self.log_file = log_file
        self._end = weakref.finalize(self, _end, process, folder, os.getpid())

    def wait_until_healthy(self, timeout: float) -> None:
        """Wait until the server takes requests. Raises `EngineError`, with what it said last."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            with suppress(OSError, ValueError):
                _get(f"{self.url}/health", {})
                # Only this very server knows its key: something else might have come by the port.
                if "vgen" in json.loads(_get(f"{self.url}/vgen/info", {CONTROL_HEADER: self.control_key})):
                    return
            if time.monotonic() > deadline:
                raise EngineError(f"vLLM was not ready to serve {self.model} within {timeout:g} s{self._last_words()}")
            time.sleep(POLL_SECONDS)
        raise self.death("before it was ready")

    def death(self, when: str) -> EngineError:
        """What to raise now that it has ended by itself."""
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return EngineError(f"vLLM {how} {when}, serving {self.model}: {self._reason()}{self._last_words()}")

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End the server and all of its processes; whatever is left after `timeout` seconds is killed."""
        if found := self._end.detach():
            _end(*found[2], timeout=timeout)

    def _reason(self) -> str:
        """The error that it ended with, out of the tracebacks of several processes."""
        errors = [found for line in self._log() if _ERROR.match(found := _LOG_PREFIX.sub("", line).strip())]
        causes = [error for error in errors if "See root cause above" not in error]
        return (causes or errors or ["it gave no reason"])[-1]

    def _last_words(self) -> str:
        return "\n".join(["; its log ends with:", *self._log()[-LAST_LINES:]])

    def _log(self) -> list[str]:
        with suppress(OSError):
            return self.log_file.read_text(errors="replace").splitlines()
        return []

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


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
    """Start a server and, unless told not to, wait until it is healthy, for at most `timeout` seconds.

        with start_server("Qwen/Qwen3-0.6B", arguments=["--max-model-len", "4096"]) as server:
            print(server.url)

    `port` 0 takes a free one. Without a `control_key` a random one is made. `arguments` go to vLLM as they are, after
    vgen's own, and `environment` is added to this process's. A `log_file` is appended to and stays; without one the
    log goes with the server. Raises `EngineError`, with what vLLM said last.
    """
    _check(model)
    port = free_port(host, port)
    control_key = _header_safe(control_key) if control_key is not None else secrets.token_urlsafe(32)
    folder = tempfile.TemporaryDirectory(prefix="vgen-serve-")  # its mode is 0700
    key_file = Path(folder.name, _KEY_FILE)
    log_path = Path(log_file) if log_file is not None else Path(folder.name, "server.log")
    key_file.touch(mode=0o600)
    key_file.write_text(control_key)
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
            env={**variables, KEY_FILE_VARIABLE: str(key_file), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a group that can be ended as a whole, and that Ctrl-C does not reach by itself
        )
    scheme = "https" if _given(arguments, "--ssl-certfile") else "http"
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"{scheme}://{f'[{reachable}]' if ':' in reachable else reachable}:{port}"
    server = ServerProcess(process, str(model), url, control_key, log_path, folder)
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
    """The command line. What the caller gives in `arguments` comes last, and wins."""
    # `python -m`: there is no `vllm` command in the CPU build. And it has one front end, where the lease can be kept.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", host, "--port", str(port)]
    command += ["--middleware", "vgen.engines.control.ControlMiddleware"]
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
        command.append("--disable-uvicorn-access-log")  # a line for each of a step's thousand requests
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
    """The environment of a server: this process's, without what torchrun put there. Keys travel here, not in `ps`."""
    variables = {name: value for name, value in lifeline.environment().items() if not _TORCHRUN.fullmatch(name)}
    variables |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONUNBUFFERED": "1"}
    variables.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")  # behind the control key
    if plugins := variables.get("VLLM_PLUGINS"):
        variables["VLLM_PLUGINS"] = f"{plugins},vgen"
    if api_key is not None:
        variables["VLLM_API_KEY"] = _header_safe(api_key)
    if shared_memory_directory is not None:
        variables["VGEN_SHARED_MEMORY_DIR"] = str(Path(shared_memory_directory).absolute())
    if otlp_traces_endpoint and re.search(r":4318\b|/v1/traces/?$", otlp_traces_endpoint):
        variables.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    if on_cpu() and not _compiles(arguments):
        variables.setdefault("TORCH_COMPILE_DISABLE", "1")  # the sampler is compiled even by an eager engine
    if on_cpu() and workers > len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))):
        # By default vLLM binds each worker to a NUMA node of its own, and refuses to start with too few.
        variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    return variables


def on_cpu() -> bool:
    """Whether vLLM here is its CPU build, by the rule that vLLM has for it and without importing it."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    for name, mark in (("vllm", "cpu"), ("vllm-cpu", "")):
        with suppress(importlib.metadata.PackageNotFoundError):
            return mark in importlib.metadata.version(name)
    return False


def _check(model: str | Path) -> None:
    """Refuse at once what would only fail after vLLM has been imported."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vgen serve", "vLLM", "vllm' or, without a GPU, 'vgen[cpu")
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="vgen"):
        raise EngineError("vLLM would not find vgen's plugin, which is not registered here: install vgen with pip")
    path = Path(model).expanduser()
    if (path.is_absolute() or str(model).startswith((".", "~"))) and not path.exists():
        raise EngineError(f"there is no model at {model}")
    if path.is_dir() and not any(path.glob("*config.json")) and not any(path.glob("params.json")):
        raise EngineError(f"{model} is not a model directory: it has no config.json")


def free_port(host: str, port: int = 0) -> int:
    """`port`, or where that is 0 one that is free at `host`. Raises `EngineError` where nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        return probe.getsockname()[1]


def _header_safe(key: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise ValueError("a key must be printable ASCII without spaces around it")
    return key


def _get(url: str, headers: dict[str, str]) -> bytes:
    # Straight to the server, whatever proxy there is, and whatever name its certificate has.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=5.0) as answer:
        return answer.read()


def _compiles(arguments: Sequence[str]) -> bool:
    """Whether the caller wants compilation, which on a CPU takes longer than it gains."""
    short = any(argument.startswith(("-O", "-cc")) for argument in arguments)
    return short or "--no-enforce-eager" in arguments or _given(arguments, "--compilation-config")


def _given(arguments: Sequence[str], *flags: str) -> bool:
    """Whether the caller has said anything about one of `flags`, in any of the spellings that vLLM takes."""
    names = {argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("-")}
    return any(flag in names or flag.replace("--", "--no-", 1) in names for flag in flags)


def _end(
    process: subprocess.Popen[bytes],
    folder: tempfile.TemporaryDirectory[str],
    owner: int,
    *,
    timeout: float = STOP_SECONDS,
) -> None:
    if os.getpid() != owner:  # a fork of the process that started the server
        return
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
            _wait_until_gone(process.pid, 5.0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        folder.cleanup()


def _wait_until_gone(group: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
