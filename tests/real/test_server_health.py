"""Two real servers of which one's engine is stopped, goes on, and is killed: who notices it, and how soon."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.waiting import wait_until

from vgen import Sampling, ServerConnection, ServerGeneration
from vgen.demo import max_logprob_difference
from vgen.testing import tiny_model

ARGUMENTS = ["--port", "0", "--json", "--max-model-len", "512", "--dtype", "float32"]
ARGUMENTS += ["--kv-cache-memory-bytes", str(64 << 20)]
NOTICED_SECONDS = 4.0
"""Within which a stopped or killed core must be noticed. The server looks every second."""
ENDED_SECONDS = 20.0
"""Within which `vgen serve` must end once its core is gone."""
LONG = Sampling(max_tokens=400, ignore_eos=True)


class Server:
    """A `vgen serve` command."""

    def __init__(self, model: Path, key_file: Path) -> None:
        command = [sys.executable, "-m", "vgen.cli", "serve", str(model), *ARGUMENTS]
        command += ["--control-key-file", str(key_file)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self.lines.extend, args=(self.process.stderr,))
        self._reader.start()

    def wait_until_healthy(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.error()[-3000:]
        self.described = json.loads(line)
        self.url, self.key = self.described["url"], Path(self.described["control_key_file"]).read_text()

    def error(self) -> str:
        """What the command has written to standard error until its end."""
        self._reader.join(30)
        return "".join(self.lines)

    def get(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Send a GET, or a POST with a body; returns the status, and the answer or the error's JSON."""
        raw = None if body is None else json.dumps(body).encode()
        sent = {"X-Vgen-Control-Key": self.key, "Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, data=raw, headers=sent)
        try:
            with urllib.request.urlopen(request, timeout=2 if body is None else 20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def health(self) -> int:
        """The status of `/health`; 0 if nobody answers."""
        try:
            return self.get("/health")[0]
        except OSError:
            return 0

    def core(self) -> psutil.Process:
        """The core's process. vLLM gives it this name."""
        children = psutil.Process(self.described["pid"]).children(recursive=True)
        return next(child for child in children if "EngineCore" in child.name())

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.error()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("model")
    return tiny_model(folder)[0], folder


@pytest.fixture(scope="module")
def servers(model, tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    key = tmp_path_factory.mktemp("keys") / "control-key"
    key.write_text("the-key-of-both")
    both = Server(model[1], key), Server(model[1], key)
    try:
        for server in both:
            server.wait_until_healthy()
        yield both
    finally:
        for server in both:
            server.end()


@pytest.fixture
def generation(model, servers) -> Iterator[ServerGeneration]:
    keys = {"control_key": servers[0].key, "connection": ServerConnection(timeout=120.0)}
    with ServerGeneration(None, base_urls=[server.url for server in servers], **keys) as generation:
        yield generation


def seconds(condition: Callable[[], Any], timeout: float) -> float:
    """Wait until the condition holds, and return how long that took."""
    start = time.monotonic()
    wait_until(condition, timeout, every=0.05)
    return time.monotonic() - start


def generate(generation: ServerGeneration) -> Any:
    return generation.generate([[1 + i, 2] for i in range(256)], LONG)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_that_run_may_be_resumed_again_and_the_log_says_who_did_what(servers):
    server, _ = servers
    status, answer = server.get("/vgen/lease", {"holder": "the auditor"})
    assert status == 200
    lease = {"X-Vgen-Lease": json.loads(answer)["token"]}
    for path in ("/vgen/pause", "/resume", "/resume", "/wake_up", "/sleep?level=0", "/wake_up", "/wake_up"):
        assert server.get(path, {}, **lease)[0] == 200, path
        stopped = path.startswith(("/vgen/pause", "/sleep"))
        assert json.loads(server.get("/is_paused")[1]) == {"is_paused": stopped}
    assert server.get("/vgen/lease/release", {}, **lease)[0] == 200
    log = Path(server.described["log_file"]).read_text()
    events = re.findall(r'vgen\.audit (\w+) .*holder="the auditor".* client="127\.0\.0\.1:\d+"$', log, re.MULTILINE)
    resumes = ["resume", "resume", "wake_up", "sleep", "wake_up", "wake_up"]
    assert events == ["take_lease", "pause", *resumes, "release_lease"]
    assert server.key not in log
    assert lease["X-Vgen-Lease"] not in log


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(
    point="a real engine's processes",
    did="SIGSTOP for the core of one of two real servers",
    happens="The other server answers the whole call",
    within=300,
)
def test_a_stopped_core_is_noticed_and_its_work_goes_to_the_other_server(model, servers, generation):
    first, second = servers
    core = first.core()
    core.suspend()
    try:
        seconds(lambda: first.health() == 503, NOTICED_SECONDS)
        status, answer = first.get("/is_paused")
        assert (status, answer["error"]["type"]) == (503, "vgen_engine")
        assert f"is stopped (by SIGSTOP; SIGCONT lets it go on): process {core.pid}" in answer["error"]["message"]
        assert second.health() == 200
        rollouts = generate(generation)
        assert {completion.server for completion in rollouts} == {second.url}
        assert max_logprob_difference(model[0], rollouts) <= 1e-4
    finally:
        core.resume()
    seconds(lambda: first.health() == 200, NOTICED_SECONDS)
    assert {completion.server for completion in generate(generation)} == {first.url, second.url}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(
    point="a real engine's processes",
    did="SIGSTOP for a real core in a call",
    happens="The signs of life end, and so does the call",
    within=300,
)
def test_a_core_that_stops_under_a_call_ends_the_signs_of_life(servers, generation):
    first, _ = servers
    core, rollouts = first.core(), []
    caller = threading.Thread(target=lambda: rollouts.append(generate(generation)))
    caller.start()
    try:
        wait_until(lambda: re.search(rb"num_requests_running\S* [1-9]", first.get("/metrics")[1]), 30)
        core.suspend()
        caller.join(60)  # a sign of life every five seconds would keep the call waiting to its timeout of 120 s
        assert not caller.is_alive()
    finally:
        core.resume()
        caller.join()
    assert len(rollouts[0]) == 256
    assert all(len(completion.token_ids) == 400 for completion in rollouts[0])
    seconds(lambda: first.health() == 200, NOTICED_SECONDS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(
    point="a real engine's processes",
    did="SIGKILL for a real core",
    happens="The call fails with the reason, and `vgen serve` ends",
    within=300,
)
def test_a_killed_core_is_noticed_and_ends_the_server_with_the_reason(model, servers, generation):
    first, second = servers
    core = first.core()
    core.kill()
    seconds(lambda: first.health() != 200, NOTICED_SECONDS)
    seconds(lambda: first.process.poll() is not None, ENDED_SECONDS)
    assert first.process.returncode == 1
    (reason,) = [line for line in first.error().splitlines() if line.startswith("vgen serve: vLLM")]
    assert f"EngineCore (PID {core.pid}) was ended by SIGKILL" in reason
    assert not Path(first.described["control_key_file"]).exists()
    assert {completion.server for completion in generate(generation)} == {second.url}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(
    point="a real engine's processes",
    did="SIGTERM while a request is stuck",
    happens="The server ends",
    within=300,
)
def test_a_request_that_is_stuck_does_not_keep_the_server_alive(servers):
    _, server = servers
    address = server.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((address[0], int(address[2]))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())  # and never the rest of the body
        wait_until(lambda: server.health() == 200)
        os.kill(server.described["pid"], signal.SIGTERM)
        seconds(lambda: not psutil.pid_exists(server.described["pid"]), ENDED_SECONDS)
        server.process.wait(10)


SENDS_GARBAGE = """
import asyncio, multiprocessing, sys

async def main():
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vgen.engines.server.core_health import CoreHealth

    options = dict(dtype="float32", max_model_len=128, kv_cache_memory_bytes=16 << 20, enforce_eager=True)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=sys.argv[1], **options))
    health, client = CoreHealth(engine, multiprocessing.active_children()), engine.engine_core
    health.look()
    print("before:", health.problem, flush=True)
    await client._send_input_message((b"\\0", b"this is no request"), client.core_engine)
    async with asyncio.timeout(20):
        await health.watch(lambda: None)
    print("after:", health.problem, flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_core_whose_decoder_thread_has_failed_is_gone(model, tmp_path):
    (tmp_path / "main.py").write_text(SENDS_GARBAGE)
    variables = {"VGEN_LAUNCHER_PID": str(os.getpid()), "TORCH_COMPILE_DISABLE": "1"}  # as in a server of vgen's
    command = [sys.executable, str(tmp_path / "main.py"), str(model[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, env={**os.environ, **variables})
    assert "before: \n" in done.stdout, done.stderr[-3000:]
    assert re.search(
        r"after: the engine's core has ended: EngineCore\S* \(PID \d+\) ended with status 1\n", done.stdout
    )
    assert "the thread of the engine's core for process_input_sockets has failed" in done.stderr
