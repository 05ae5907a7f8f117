"""`vgen serve` on real vLLM: its settings, its keys and lease, and how it ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from helpers.waiting import wait_until

from vgen.testing import tiny_model

PROMPT = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
NO_KEYS = {"Authorization": None, "X-Vgen-Control-Key": None}


def serve(*arguments: str, **kwargs) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vgen.cli", "serve", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [found for found in processes if found.is_running() and found.status() != psutil.STATUS_ZOMBIE]


def test_it_serves_what_vgen_relies_on(server):
    info = server.done("/vgen/info")
    assert {"control_key", "lease", "weights_state", "shared_memory"} <= set(info["features"])
    assert (info["model"], info["world_size"], info["max_model_len"]) == (server.folder, 1, 512)
    assert (info["weights"], info["lease"]) == ("ready", None)
    config = server.done("/server_info?config_format=json")["vllm_config"]
    assert config["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert config["model_config"]["enforce_eager"] is True
    answer = server.done("/v1/completions", {"model": server.folder, "return_token_ids": True, **PROMPT})
    assert answer["metrics"]["time_to_first_token_ms"] > 0
    assert len(answer["choices"][0]["token_ids"]) == 4
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2, "ignore_eos": True}}
    assert len(server.done("/inference/v1/generate", body)["choices"][0]["token_ids"]) == 2


def test_a_request_keeps_its_id_and_its_span_is_a_child_of_the_sent_context(server):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"X-Request-Id": "mine", "traceparent": f"00-{trace}-{parent}-01"}
    answer = server.done("/v1/completions", {"model": server.folder, **PROMPT}, headers=headers)
    assert answer["id"] == "cmpl-mine"

    (span,) = wait_until(lambda: [span for span in server.collector.spans if span.trace_id.hex() == trace])
    assert (span.name, span.parent_span_id.hex()) == ("llm_request", parent)


def test_without_a_key_only_health_version_and_metrics_answer(server):
    for path in ("/health", "/version", "/metrics"):
        assert server.call(path, headers=NO_KEYS)[0] == 200, path
    for path in ("/v1/models", "/server_info", "/is_paused", "/weight_info", "/openapi.json", "/vgen/info"):
        assert server.call(path, headers=NO_KEYS)[0] == 401, path
    for path in (
        "/v1/completions",
        "/pause",
        "/sleep",
        "/collective_rpc",
        "/update_weights",
        "/tokenize",
        "/reset_prefix_cache",
    ):
        assert server.call(path, {}, headers=NO_KEYS)[0] == 401, path
    assert server.done("/is_paused") == {"is_paused": False}


def test_each_key_opens_its_own_routes(server):
    only_api = {"X-Vgen-Control-Key": None}
    only_control = {"Authorization": None}
    assert server.call("/v1/models", headers=only_api)[0] == 200
    assert server.call("/v1/models", headers=only_control)[0] == 401
    assert server.call("/is_paused", headers=only_control)[0] == 200
    for key in (None, "wrong", server.api_key, server.control_key[:-1]):
        status, answer = server.call("/pause", {}, headers={"X-Vgen-Control-Key": key})
        assert status == 401
        assert "X-Vgen-Control-Key" in answer["error"]["message"]
        assert server.control_key[:-1] not in str(answer)


def test_keys_are_neither_on_a_command_line_nor_in_a_log(server):
    lines = [" ".join(found.cmdline()) for found in [psutil.Process(server.process.pid), *server.processes()]]
    assert any("vllm.entrypoints" in line for line in lines)
    log = Path(server.described["log_file"]).read_text()
    key_file = Path(server.described["control_key_file"])
    for key in (server.api_key, server.control_key):
        assert key not in "\n".join([*lines, log, str(server.described)])
        assert key not in str(server.done("/server_info?config_format=json"))
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(key_file.parent.stat().st_mode) == 0o700
    for found in server.processes():
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in found.environ()


def test_only_the_holder_of_the_lease_changes_the_server(server):
    first = server.done("/vgen/lease", {"holder": "first", "ttl_seconds": 60})
    mine = {"X-Vgen-Lease": first["token"]}
    for path in ("/pause", "/sleep?level=1", "/start_weight_update", "/reset_prefix_cache", "/collective_rpc"):
        status, answer = server.call(path, {}, headers={"X-Vgen-Lease": None})
        assert status == 409, path
        assert answer["error"]["lease"]["holder"] == "first"
    assert server.call("/vgen/lease", {"holder": "second"})[0] == 409
    server.done("/pause", {}, headers=mine)
    assert server.done("/is_paused") == {"is_paused": True}

    second = server.done("/vgen/lease", {"holder": "second", "takeover": True})
    assert second["epoch"] == first["epoch"] + 1
    status, answer = server.call("/resume", {}, headers=mine)
    assert status == 409
    assert "'second'" in answer["error"]["message"]
    assert first["token"] not in str(answer)
    assert second["token"] not in str(server.done("/vgen/info"))
    theirs = {"X-Vgen-Lease": second["token"]}
    server.done("/resume", {}, headers=theirs)
    server.done("/v1/completions", {"model": server.folder, **PROMPT})  # needs no lease
    server.done("/vgen/lease/release", {}, headers=theirs)
    assert server.call("/reset_prefix_cache", {}, headers=theirs)[0] == 409
    server.done("/reset_prefix_cache", {})  # allowed, as on a stock server, because nobody holds the lease


def test_a_folder_without_a_model_is_an_error_that_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    for model, says in ((str(tmp_path / "nowhere"), "there is no model"), (str(tmp_path / "empty"), "config.json")):
        process = serve(model)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (1, "")
        assert says in stderr


@pytest.mark.slow
def test_a_model_that_does_not_exist_is_an_error_that_says_so():
    process = serve("nobody/nothing-of-this-name", "--port", "0", "--quiet")
    stdout, stderr = process.communicate(timeout=240)
    assert (process.returncode, stdout) == (1, "")
    assert "nobody/nothing-of-this-name" in stderr.splitlines()[0]
    assert "before it was ready" in stderr
    assert "Traceback" not in stderr.splitlines()[0]


def test_sigterm_during_startup_ends_it_with_status_zero(tmp_path):
    tiny_model(tmp_path)
    process = serve(str(tmp_path), "--port", "0")
    command = psutil.Process(process.pid)
    children = wait_until(lambda: command.children(recursive=True), 60)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    wait_until(lambda: alive(children) == [])  # init has reaped what the end has killed


def test_a_signal_in_the_middle_of_starting_to_repeat_the_log_is_heard(tmp_path, monkeypatch):
    from vgen.engines.server.command import LogFollower

    class Interrupted(BaseException):
        pass

    def start(thread):
        raise Interrupted

    log = LogFollower()
    (tmp_path / "log").touch()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(Interrupted):
            log.follow(tmp_path / "log")
    log.close()


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_orphan(tmp_path):
    tiny_model(tmp_path)
    process = serve(str(tmp_path), "--port", "0", env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"})
    command = psutil.Process(process.pid)
    assert process.stderr is not None
    while "vLLM" not in (line := process.stderr.readline()):  # vLLM's first line; its plugins are loaded by then
        assert line, "it ended by itself"
    children = command.children(recursive=True)
    assert children
    process.kill()
    process.communicate(timeout=20)
    wait_until(lambda: not alive(children), 20)
