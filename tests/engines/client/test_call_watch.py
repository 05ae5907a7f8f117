"""A server that is gone or stopped while calls wait for it: noticed within seconds, whatever the deadline is."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from helpers.server_generation import BATCH, COMPLETIONS, PROMPTS, calls, generation, tokens
from helpers.waiting import wait_until

from vgen import Sampling, ServerConnection, ServerError, ServerGeneration, WeightSyncError
from vgen import completion_codec as codec
from vgen.engines.client import call_watch
from vgen.engines.client.http import HttpClient
from vgen.testing import FaultyServer

SAMPLING = Sampling(max_tokens=2, logprobs=None)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Everything at a fortieth of its time."""
    monkeypatch.setattr(call_watch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(call_watch, "STOPPED_SECONDS", 0.2)
    monkeypatch.setattr("vgen.engines.client.http.ANSWER_SECONDS", 0.3)


def completed(body):
    return {"id": "x", "choices": [{"index": 0, "token_ids": body["prompt"][:2], "finish_reason": "length"}]}


class Held:
    """A fault that answers well, but only when the test says so."""

    def __init__(self, well=lambda given: given):
        self.begun, self._go, self._well = threading.Semaphore(0), threading.Event(), well

    def __call__(self, given):
        self.begun.release()
        assert self._go.wait(30)
        return self._well(given)

    def answer(self):
        self._go.set()


@pytest.mark.parametrize("features", [(), ("batch", "lease")])
@pytest.mark.fault(
    point="the engine's core behind a server",
    did="The core of one of two servers is dead while calls wait",
    happens="The other server answers them",
    within=60,
)
def test_the_calls_of_a_server_with_a_dead_core_go_to_the_others(features):
    path = BATCH if features else COMPLETIONS
    with (
        FaultyServer(features=features) as dead,
        FaultyServer(features=features) as other,
        generation(dead, other, timeout=600) as made,
    ):
        made.sync_weights(verify="none")
        dead.faults = {path: ["silent"] * 99, "/health": [503] * 99}
        assert tokens(made.generate(PROMPTS, SAMPLING)) == [prompt[:2] for prompt in PROMPTS]
        assert calls(dead, path)


@pytest.mark.parametrize("features", [(), ("batch", "lease")])
@pytest.mark.fault(
    point="the engine's core behind a server",
    did="The core of the only server is dead",
    happens="`ServerError` with the server's reason, long before the timeout",
    within=60,
)
def test_the_error_names_the_server_and_its_reason(features):
    path = BATCH if features else COMPLETIONS
    with FaultyServer(features=features) as dead, generation(dead, timeout=600) as made:
        made.sync_weights(verify="none")
        dead.faults = {path: ["silent"] * 99, "/health": [503] * 99}
        with pytest.raises(ServerError, match="GET /health answered 503: the server says no") as caught:
            made.generate([[1]], SAMPLING)
        assert (caught.value.url, caught.value.status) == (dead.url, 503)
        dead.faults.clear()
        assert tokens(made.generate([[1]], SAMPLING)) == [[1]]


def test_a_change_does_not_wait_for_a_dead_core(server):
    with generation(server, timeout=600) as made:
        made.sync_weights(verify="none")
        server.faults = {"/pause": ["silent"], "/health": [503] * 99}
        with pytest.raises(WeightSyncError, match=r"phase 'pause' of http.*GET /health answered 503"):
            made.sync_weights()


@contextmanager
def waiting(loop, listener):
    """A call that has arrived at a raw socket, which answers nothing; yields its future and its connection."""
    client = HttpClient(f"http://127.0.0.1:{listener.getsockname()[1]}")
    flight = loop.start(client.infer(COMPLETIONS, b"{}", {}, len, 600.0))
    connection, _ = listener.accept()
    with connection:
        yield flight
    loop.run(client.close())


@pytest.mark.fault(
    point="an API server that is silent",
    did="The server is gone while calls wait",
    happens="The calls end with `ServerError` within seconds",
    within=60,
)
def test_refused_connections_end_the_calls_that_wait(loop):
    with socket.create_server(("127.0.0.1", 0)) as listener, waiting(loop, listener) as flight:
        listener.close()
        with pytest.raises(ServerError, match="GET /health failed: ClientConnectorError"):
            flight.result(20)


@pytest.mark.fault(
    point="an API server that is silent",
    did="The server accepts connections and answers nothing",
    happens="The calls end with `ServerError` within seconds",
    within=60,
)
def test_a_server_that_says_nothing_at_all_ends_the_calls_that_wait(loop):
    """Its process is stopped: the kernel still takes connections."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        waiting(loop, listener) as flight,
        pytest.raises(ServerError, match=r"GET /health was not answered within 0.3 s"),
    ):
        flight.result(20)


@pytest.mark.fault(
    point="an API server that is silent",
    did="Every second health check fails",
    happens="The calls go on",
    within=60,
)
def test_one_bad_look_is_chance(server):
    held = Held(completed)
    with generation(server, timeout=600) as made, ThreadPoolExecutor() as pool:
        made.sync_weights(verify="none")
        server.faults = {COMPLETIONS: [held], "/health": [503, None] * 500}
        before = len(calls(server, "/health"))
        flight = pool.submit(made.generate, [[1, 2, 3]], SAMPLING)
        wait_until(lambda: len(calls(server, "/health")) > before + 6)
        held.answer()
        assert tokens(flight.result(20)) == [[1, 2]]
        assert len(calls(server, COMPLETIONS)) == 1


def test_many_calls_that_wait_ask_no_more_than_one(server):
    held = Held(completed)
    with generation(server, timeout=600) as made, ThreadPoolExecutor(30) as pool:
        made.sync_weights(verify="none")
        server.faults = {COMPLETIONS: [held] * 30}
        flights = [pool.submit(made.generate, [[1, 2, 3]], SAMPLING) for _ in range(30)]
        for _ in range(30):
            assert held.begun.acquire(timeout=20)
        begun, before = time.monotonic(), len(calls(server, "/health"))
        wait_until(lambda: len(calls(server, "/health")) > before + 5)
        asked, seconds = len(calls(server, "/health")) - before, time.monotonic() - begun
        held.answer()
        assert [tokens(flight.result(20)) for flight in flights] == [[[1, 2]]] * 30
    assert asked <= seconds / call_watch.LOOK_SECONDS + 1


class Heart:
    """A server whose batch route sends a sign of life all the time and nothing else. `/health` answers `status`."""

    def __init__(self, status, tokens=lambda: 0):
        self.status, self._tokens, self.asked = status, tokens, 0

    async def answer(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/health" in head:
            self.asked += 1
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}" % self.status)
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while not writer.is_closing():
            writer.write(codec.frame_bytes(codec.Alive(1, self._tokens())))
            await asyncio.sleep(0.01)


async def beat(heart):
    """Ask such a server for a completion."""
    from vgen.engine_protocol import Batch, Request
    from vgen.engines.client import batch_client

    async with await asyncio.start_server(heart.answer, "127.0.0.1", 0) as server:
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        requests = [Request(0, 0, [1], None)]
        try:
            async for _ in batch_client.complete(client, Batch(requests, SAMPLING), requests, 600.0):
                pass
        finally:
            await client.close()


def test_signs_of_life_of_the_route_are_none_of_the_engine(loop):
    with pytest.raises(ServerError, match="GET /health answered 503"):
        loop.run(beat(Heart(503)), 20)


def test_a_server_that_samples_is_not_asked(loop):
    count = iter(range(10**9))
    heart = Heart(503, tokens=lambda: next(count))
    with pytest.raises(TimeoutError):
        loop.run(beat(heart), 0.5)
    assert heart.asked == 0


STOPPED = {"paused": {"/is_paused": {"is_paused": True}}}
STOPPED["asleep"] = STOPPED["paused"] | {
    "/is_sleeping": {"is_sleeping": True},
    "/metrics": b'vllm:engine_sleep_state{engine="0",sleep_state="awake"} 0.0\n',
}


@pytest.mark.parametrize("state", STOPPED)
def test_a_server_that_another_client_has_stopped_ends_the_calls_that_wait(ours, state):
    with generation(ours, timeout=600) as made:
        made.sync_weights(verify="none")
        ours.faults = {BATCH: ["silent"] * 99}
        ours.answers |= STOPPED[state]
        with pytest.raises(ServerError, match=rf"the server is {state}: another client .* sync_weights\(\) starts it"):
            made.generate([[1]], SAMPLING)


@pytest.mark.parametrize("holder", [None, {"holder": "a trainer"}])
def test_a_frozen_engine_waits_for_a_server_whose_trainer_may_start_it_again(ours, holder):
    held = Held()
    with ServerGeneration(None, base_urls=[ours.url], connection=ServerConnection(timeout=600)) as judge:
        ours.answers |= STOPPED["paused"]
        ours.answers["/vgen/info"] = ours.answers["/vgen/info"] | {"lease": holder}
        if holder is None:
            ours.faults = {BATCH: ["silent"] * 99}
            with pytest.raises(ServerError, match="the server is paused: its trainer must call"):
                judge.generate([[1]], SAMPLING)
            return
        ours.faults = {BATCH: [held]}
        with ThreadPoolExecutor() as pool:
            flight = pool.submit(judge.generate, [[1]], SAMPLING)
            before = len(calls(ours, "/vgen/info"))
            wait_until(lambda: len(calls(ours, "/vgen/info")) > before + 4)
            held.answer()
            assert tokens(flight.result(20)) == [[1]]


def test_a_pause_of_this_trainer_is_no_fault(ours):
    held = Held()
    with generation(ours, timeout=600) as made, ThreadPoolExecutor() as pool:
        made.sync_weights(verify="none")
        ours.faults = {BATCH: [held]}
        flight = pool.submit(made.generate, [[1]], SAMPLING)
        assert held.begun.acquire(timeout=20)
        made.pause()
        ours.answers |= STOPPED["paused"]
        before = len(calls(ours, "/health"))
        wait_until(lambda: len(calls(ours, "/health")) > before + 10)
        held.answer()
        assert tokens(flight.result(20)) == [[1]]


def test_a_sync_of_this_trainer_is_no_fault(ours):
    """Its requests wait in the paused server, however long the weights take."""
    held, load = Held(), Held(lambda body: {})
    with generation(ours, timeout=600) as made, ThreadPoolExecutor() as pool:
        made.sync_weights(verify="none")
        ours.faults = {BATCH: [held], "/reset_mm_cache": [load]}
        flight = pool.submit(made.generate, [[1]], SAMPLING)
        assert held.begun.acquire(timeout=20)
        ours.answers |= STOPPED["paused"]
        sync = pool.submit(made.sync_weights, verify="none")
        assert load.begun.acquire(timeout=20)
        before = len(calls(ours, "/health"))
        wait_until(lambda: len(calls(ours, "/health")) > before + 10)
        del ours.answers["/is_paused"]
        load.answer()
        sync.result(20)
        held.answer()
        assert tokens(flight.result(20)) == [[1]]
