"""Stalls, states and links with the real engine, in process and behind a server."""

from __future__ import annotations

import json
import logging
import statistics
import time
from contextlib import closing

import pytest
from helpers.threads import at_work
from helpers.waiting import wait_until

from vgen import ProfilingContext, Sampling, ServerGeneration
from vgen import completion_codec as codec
from vgen.cli import main
from vgen.engine_protocol import Batch, Request
from vgen.generation import Generation
from vgen.profiling import semconv
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.testing import MemorySink

pytestmark = pytest.mark.slow

LONG = Sampling(max_tokens=400, ignore_eos=True)
LONGER = Sampling(max_tokens=500, ignore_eos=True)
SHORT = Sampling(max_tokens=2)


class SharedEngine:
    """An engine that stays open when one of the generation objects that use it is closed."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def close(self):
        pass


def stalled(sink):
    return any(span.name == semconv.STALL for span in sink.open.values())


def connect(server, profiling, **more):
    keys = {"api_key": server.api_key, "control_key": server.control_key}
    return ServerGeneration(server.model, base_urls=[server.base_url], profiling=profiling, **keys, **more)


def generated_tokens(server):
    lines = str(server.call("/metrics")[1]).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


@pytest.fixture
def sink():
    return MemorySink()


def test_a_scheduler_that_steps_without_tokens_is_a_stall(real, sink, tmp_path, caplog, capsys):
    """vLLM's scheduler is paused without vgen: it goes on stepping, no call hangs, and no token comes."""
    profiling = ProfilingContext([sink, JsonlSink(tmp_path / "run")])
    generation = Generation(SharedEngine(real.generation.engine), [], profiling=profiling, stall_seconds=1.0)
    llm = real.generation.engine.llm
    llm.sleep(level=0)
    with caplog.at_level(logging.WARNING, "vgen"), at_work(lambda: generation.generate([[1, 2]])) as results:
        try:
            wait_until(lambda: stalled(sink), 60)
            files = list((tmp_path / "run").glob("*.jsonl"))
            wait_until(lambda: any('"start","name":"vgen.stall"' in file.read_text() for file in files), 60)
            # The record shows the stall while it lasts.
            assert main(["trace", str(tmp_path / "run")]) == 0
            assert "vgen.stall" in capsys.readouterr().out
            assert main(["report", str(tmp_path / "run"), "--json"]) == 0
            assert json.loads(capsys.readouterr().out)
        finally:
            llm.wake_up(tags=["scheduling"])
    assert len(results[0]) == 1
    (record,) = caplog.records
    assert "generate has made no progress" in record.message
    assert "vgen.generate (" in record.message
    assert "vgen.engine.generate (" in record.message
    (generate,) = sink.named(semconv.GENERATE)
    (event,) = [event for event in generate.events if event.name == semconv.STALL_OVER]
    assert event.attributes[semconv.STALL_SECONDS] >= 1.0
    generation.close()
    profiling.close()


def test_long_completions_in_process_report_progress(real):
    signs = []
    requests = [Request(0, number, [1, 2], None) for number in range(4)]
    batch = Batch(requests, LONG, on_progress=lambda: signs.append(time.monotonic()))
    with closing(real.generation.engine.stream(batch)) as stream:
        next(stream)
        assert len(signs) >= 2  # before the first completion ends


def test_sleep_on_a_cpu_reports_no_freed_memory(real):
    for level in (1, 2):
        real.generation.sleep(level)
        real.generation.wake_up()
    real.generation.sync_weights()
    for span in (*real.sink.named(semconv.SLEEP), *real.sink.named(semconv.WAKE_UP)):
        assert span.attributes[semconv.MEMORY_FREED] is False
        assert not [name for name in span.attributes if name in (semconv.DEVICE_BYTES, semconv.MEMORY_EXPECTED)]
        assert span.attributes[semconv.HOST_RESIDENT] > 0
    assert [span.attributes[semconv.SLEEP_LEVEL] for span in real.sink.named(semconv.WAKE_UP)] == [1, 2]


def test_the_phases_of_generations_and_syncs_add_up(real):
    real.sink.spans.clear()
    for _ in range(5):
        real.generation.generate([[1, 2, 3]] * 4, Sampling(max_tokens=64, ignore_eos=True), 8)
        real.generation.sync_weights(verify="logprobs")  # a longer sync: without verification a tiny model takes 7 ms
    for kind in (semconv.GENERATE, semconv.WEIGHT_SYNC):
        covered = []
        for span in real.sink.named(kind):
            parts = sum(phase.duration for phase in real.sink.spans if phase.parent is span and phase.current)
            covered.append(parts / span.duration)
        assert max(covered) <= 1
        assert statistics.median(covered) >= 0.98, (kind, covered)


def test_a_paused_server_is_a_stall_and_rollouts_link_to_their_sync(server, sink, caplog):
    # Longer than a server's first sync, which is no stall, takes on a busy machine.
    with connect(server, ProfilingContext([sink]), stall_seconds=4.0) as generation:
        generation.sync_weights("mine")
        server.done("/pause?mode=keep", {}, headers={"X-Vgen-Lease": generation.engine.endpoints[0].http.lease})
        with (
            caplog.at_level(logging.WARNING, "vgen.generation"),
            at_work(lambda: generation.generate([[1]], SHORT)) as got,
        ):
            try:
                wait_until(lambda: stalled(sink), 60)
            finally:
                server.done("/resume", {}, headers={"X-Vgen-Lease": generation.engine.endpoints[0].http.lease})
    assert got[0][0].weight_version == "mine"
    assert [record.message.partition(" has")[0] for record in caplog.records] == ["vgen: generate"]
    (stall,), (generate,) = sink.named(semconv.STALL), sink.named(semconv.GENERATE)
    assert stall.parent is generate
    (sync,) = sink.named(semconv.WEIGHT_SYNC)
    assert [(link.trace_id, link.span_id) for link in generate.links] == [(sync.trace_id, sync.span_id)]
    assert {request.attributes[semconv.FIRST_VERSION] for request in sink.named(semconv.REQUEST)} == {"mine"}


def test_a_servers_workers_are_asked_for_their_memory(server, sink):
    assert "memory" in server.done("/vgen/info")["features"]
    assert server.done("/collective_rpc", {"method": "vgen_memory"}) == {"results": [{}]}  # a CPU has no device memory
    with connect(server, ProfilingContext([sink])) as generation:
        generation.sleep(1)
        generation.wake_up()
    for span in (*sink.named(semconv.SLEEP), *sink.named(semconv.WAKE_UP)):
        assert span.attributes[semconv.MEMORY_FREED] is False
        assert semconv.DEVICE_BYTES not in span.attributes


@pytest.mark.slow
def test_tokens_are_progress_of_a_server_and_heartbeats_are_not(server, sink, monkeypatch):
    """All completions are equally long, so that none ends for long. A paused server answers, without tokens."""
    signs, decode = [], codec.decode_frame

    def heard(raw):
        frame = decode(raw)
        if isinstance(frame, codec.Alive):
            signs.append(frame.tokens)
        return frame

    monkeypatch.setattr(codec, "decode_frame", heard)
    with connect(server, ProfilingContext([sink]), stall_seconds=9.0) as generation:
        lease = {"X-Vgen-Lease": generation.engine.endpoints[0].http.lease}
        generation.generate([[1, 2]], SHORT)  # what it imports has kept this process from the clock for four seconds

        def work_a_little():  # the engine is paused before it is done, however fast the machine is
            before = generated_tokens(server)
            server.done("/resume", {}, headers=lease)
            wait_until(lambda: generated_tokens(server) > before + 256, 60)
            server.done("/pause?mode=keep", {}, headers=lease)

        with at_work(lambda: generation.generate([[1, 2]] * 256, LONGER)) as got:
            try:
                work_a_little()
                wait_until(lambda: len(signs) == 1, 60)
                work_a_little()
                wait_until(lambda: len(signs) == 2, 60)
                went_on = not sink.named(semconv.STALL) and not stalled(sink)
                assert len(sink.named(semconv.REQUEST)) == 1
                wait_until(lambda: stalled(sink), 30)
            finally:
                server.done("/resume", {}, headers=lease)
    assert signs[1] > signs[0] > 0
    assert went_on
    assert len(got[0]) == 256
    assert len(sink.named(semconv.STALL)) == 1
