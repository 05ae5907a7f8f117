"""What a server is started with, and that it never outlives whoever started it. No vLLM."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from vgen import EngineError
from vgen.engines import launch
from vgen.engines.launch import server_command, server_environment, start_server


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def command(*arguments: str, **kwargs) -> list[str]:
    return server_command("model", host="127.0.0.1", port=1, arguments=arguments, **kwargs)


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(launch, "on_cpu", lambda: True)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(launch, "on_cpu", lambda: False)


def test_what_the_rest_relies_on_is_switched_on(cuda):
    found = command(tensor_parallel_size=2, data_parallel_size=4, otlp_traces_endpoint="http://c:4317")
    assert found[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert value(found, "--middleware") == "vgen.engines.control.ControlMiddleware"
    assert value(found, "--weight-transfer-config") == '{"backend": "vgen_shm"}'
    assert value(found, "--logprobs-mode") == "processed_logprobs"
    assert (value(found, "--tensor-parallel-size"), value(found, "--data-parallel-size")) == ("2", "4")
    assert value(found, "--otlp-traces-endpoint") == "http://c:4317"
    assert {"--enable-scale-out", "--enable-per-request-metrics", "--enable-request-id-headers"} <= set(found)
    assert not {"--enforce-eager", "--kv-cache-memory-bytes"} & set(found)


def test_on_a_cpu_it_is_eager_and_small_unless_told_otherwise(cpu):
    assert "--enforce-eager" in command()
    assert value(command(), "--kv-cache-memory-bytes") == str(1 << 30)
    for given in ("--no-enforce-eager", "--compilation-config={}", "--compilation_config", "-O3"):
        assert "--enforce-eager" not in command(given), given
        assert "TORCH_COMPILE_DISABLE" not in server_environment([given]), given
    assert command("--gpu-memory-utilization=0.2").count("--kv-cache-memory-bytes") == 0
    assert command("--kv_cache_memory_bytes", "5").count("--kv-cache-memory-bytes") == 0
    assert server_environment()["TORCH_COMPILE_DISABLE"] == "1"
    assert server_environment(["--enforce-eager"])["TORCH_COMPILE_DISABLE"] == "1"
    assert server_environment(workers=64)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_what_the_caller_gives_comes_last(cuda):
    found = command("--logprobs-mode", "raw_logprobs", "--max-model-len", "5")
    assert found[-4:] == ["--logprobs-mode", "raw_logprobs", "--max-model-len", "5"]


def test_keys_travel_in_the_environment_and_torchrun_stays_behind(monkeypatch, cuda):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "there")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    found = server_environment(api_key="secret", otlp_traces_endpoint="http://c:4318/v1/traces")
    assert not {"LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "VLLM_ALLOW_INSECURE_SERIALIZATION"} & set(found)
    assert (found["VLLM_API_KEY"], found["VLLM_SERVER_DEV_MODE"]) == ("secret", "1")
    assert found["VLLM_PLUGINS"] == "mine,vgen"
    assert found["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert "secret" not in " ".join(command())
    for bad in ("", " x", "a\nb", "ä"):
        with pytest.raises(ValueError, match="printable ASCII"):
            server_environment(api_key=bad)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


@pytest.fixture
def instead(monkeypatch):
    """Runs a line of Python in place of vLLM."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed, and start_server looks for it")

    def install(code: str) -> None:
        def run(*_, port: int, **__) -> list[str]:
            return [sys.executable, "-c", textwrap.dedent(code).replace("PORT", str(port))]

        monkeypatch.setattr(launch, "server_command", run)

    return install


def test_a_server_that_dies_at_its_start_says_why(instead, model):
    instead(
        """
        print("(EngineCore pid=1) ERROR 01-02 03:04:05 [core.py:1] ValueError: the one reason")
        raise RuntimeError("Engine core initialization failed. See root cause above.")
        """
    )
    with pytest.raises(EngineError, match=r"ended with status 1 before it was ready, serving .*: ValueError: the one"):
        start_server(model)


def test_a_server_that_never_answers_is_ended_at_its_deadline(instead, model):
    instead("import time; print('still loading', flush=True); time.sleep(600)")
    start, began = time.monotonic(), time.time() - 1.0
    with pytest.raises(EngineError, match=r"not ready to serve .* within 1 s(.|\n)*still loading"):
        start_server(model, timeout=1.0)
    assert time.monotonic() - start < 10
    assert [child for child in psutil.Process().children() if child.create_time() > began] == []


def test_a_server_that_does_not_want_to_end_is_killed_with_its_children(instead, model):
    instead(
        """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        time.sleep(600)
        """
    )
    server = start_server(model, wait=False)
    process = psutil.Process(server.process.pid)
    while not (children := process.children()):
        time.sleep(0.05)
    folder = server.control_key_file.parent
    server.stop(timeout=0.5)
    server.stop()
    assert server.process.returncode == -signal.SIGKILL
    time.sleep(0.2)
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert not folder.exists()


def test_another_server_is_not_taken_for_it(instead, model):
    instead(
        """
        import sys
        from http.server import BaseHTTPRequestHandler, HTTPServer

        class Healthy(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

        HTTPServer(("127.0.0.1", PORT), Healthy).serve_forever()
        """
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(EngineError, match=r"cannot listen on .*in use"),
    ):
        start_server(model, port=taken.getsockname()[1])
    with pytest.raises(EngineError, match=r"not ready to serve .* within 2 s(.|\n)*GET /vgen/info"):
        start_server(model, timeout=2.0)


PARENT = """
import os, subprocess, sys, time
from vgen.engines import lifeline
child = '''
import subprocess, sys, time
from vgen.engines.lifeline import follow_parent
follow_parent(); follow_parent()
code = "from vgen.engines.lifeline import follow_parent; import time; follow_parent(); time.sleep(600)"
print(subprocess.Popen([sys.executable, "-c", code]).pid, flush=True)
time.sleep(600)
'''
process = subprocess.Popen([sys.executable, "-c", child], env=lifeline.environment(), start_new_session=True)
print(process.pid, flush=True)
time.sleep(600)
"""


def test_all_of_a_servers_processes_end_with_a_parent_that_was_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    time.sleep(1.2)
    processes = [psutil.Process(pid) for pid in pids]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(processes, timeout=8)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_without_a_launcher_nothing_is_followed(monkeypatch):
    from vgen.engines import lifeline

    monkeypatch.delenv(lifeline.LAUNCHER_VARIABLE, raising=False)
    lifeline.follow_parent()
    assert lifeline._followed is None
    assert os.getpid() == int(lifeline.environment()[lifeline.LAUNCHER_VARIABLE])
