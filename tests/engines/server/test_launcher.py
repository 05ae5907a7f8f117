"""The command line and environment of a server. No vLLM."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from vgen import EngineError
from vgen.engines.server import launcher
from vgen.engines.server.launcher import server_command, server_environment, start_server


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def command(*arguments: str, **kwargs) -> list[str]:
    return server_command("model", host="127.0.0.1", port=1, arguments=arguments, **kwargs)


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(launcher, "on_cpu", lambda: True)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(launcher, "on_cpu", lambda: False)


def test_what_the_rest_relies_on_is_switched_on(cuda):
    found = command(tensor_parallel_size=2, data_parallel_size=4, otlp_traces_endpoint="http://c:4317")
    assert found[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert value(found, "--middleware") == "vgen.engines.server.middleware.ControlMiddleware"
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


def test_a_model_that_is_not_there_is_an_error_before_vllm_is_imported(tmp_path, vllm_is_there):
    with pytest.raises(EngineError, match="there is no model at"):
        start_server(tmp_path / "nothing")
    with pytest.raises(EngineError, match=r"not a model directory: it has no config\.json"):
        start_server(tmp_path)


@pytest.fixture
def vllm_is_there():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed, and start_server looks for it")


@pytest.mark.fault(
    point="the port of a server",
    did="Another program has the port before the start",
    happens="An error names the port at once",
    within=20,
)
def test_a_port_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(EngineError, match="cannot listen on"):
        launcher.free_port("127.0.0.1", taken.getsockname()[1])
    assert launcher.free_port("127.0.0.1") > 0
