"""Stalls, states and links with the real engine, in process and behind a server."""

from __future__ import annotations

import json
import logging
import statistics
import time
from contextlib import closing

import pytest
from threads import at_work

from vgen import ProfilingContext, Sampling, ServerGeneration
from vgen.cli import main
from vgen.engines import frames
from vgen.engines.base import Batch, Request
from vgen.generation import Generation
from vgen.profiling import names
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.testing import MemorySink

LONG = Sampling(max_tokens=400, ignore_eos=True)
LONGER = Sampling(max_tokens=500, ignore_eos=True)
SHORT = Sampling(max_tokens=2)


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def connect(server, profiling, **more):
    keys = {"api_key": server.api_key, "control_key": server.control_key}
    return ServerGeneration(server.model, base_urls=[server.base_url], profiling=profiling, **keys, **more)


@pytest.fixture
def sink():
    return MemorySink()


def test_a_scheduler_that_runs_and_computes_nothing_has_stalled(real, sink, tmp_path, caplog, capsys):
    """vLLM's scheduler, paused behind vgen's back, steps on and on without a token: no call hangs, nothing comes."""
    profiling = ProfilingContext([sink, JsonlSink(tmp_path / "run")])
    generation = Generation(real.generation.engine, [], profiling=profiling, stall_seconds=1.0)
    llm = real.generation.engine.llm
    llm.sleep(level=0)
    with caplog.at_level(logging.WARNING, "vgen"), at_work(lambda: generation.generate([[1, 2]])) as results:
        try:
            assert until(generation._watch.stalled)
            files = list((tmp_path / "run").glob("*.jsonl"))
            assert until(lambda: any('"start","name":"vgen.stall"' in file.read_text() for file in files))
            # whoever looks at the record now sees it
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
    (generate,) = sink.named(names.GENERATE)
    (event,) = [event for event in generate.events if event.name == names.STALL_OVER]
    assert event.attributes[names.STALL_SECONDS] >= 1.0
    profiling.close()
    generation._watch.close()


def test_long_completions_in_process_show_that_they_go_on(real):
    signs = []
    requests = [Request(0, number, [1, 2], None) for number in range(4)]
    batch = Batch(requests, LONG, moved=lambda: signs.append(time.monotonic()))
    with closing(real.generation.engine.stream(batch)) as stream:
        next(stream)
        assert len(signs) >= 2  # and this is the first completion


def test_sleeping_on_a_cpu_says_that_nothing_was_freed(real):
    for level in (1, 2):
        real.generation.sleep(level)
        real.generation.wake_up()
    real.generation.sync_weights()
    for span in (*real.sink.named(names.SLEEP), *real.sink.named(names.WAKE_UP)):
        assert span.attributes[names.MEMORY_FREED] is False
        assert not [name for name in span.attributes if name in (names.DEVICE_BYTES, names.MEMORY_EXPECTED)]
        assert span.attributes[names.HOST_RESIDENT] > 0
    assert [span.attributes[names.SLEEP_LEVEL] for span in real.sink.named(names.WAKE_UP)] == [1, 2]


def test_the_phases_of_generations_and_syncs_add_up(real):
    real.sink.spans.clear()
    for _ in range(5):
        real.generation.generate([[1, 2, 3]] * 4, Sampling(max_tokens=64, ignore_eos=True), 8)
        real.generation.sync_weights(verify="logprobs")  # a phase more: all else takes a tiny model 7 ms
    for kind in (names.GENERATE, names.WEIGHT_SYNC):
        covered = []
        for span in real.sink.named(kind):
            parts = sum(phase.duration for phase in real.sink.spans if phase.parent is span and phase.current)
            covered.append(parts / span.duration)
        assert max(covered) <= 1
        assert statistics.median(covered) >= 0.98, (kind, covered)


def test_a_server_that_is_paused_has_stalled_and_rollouts_point_at_their_sync(server, sink, caplog):
    with connect(server, ProfilingContext([sink]), stall_seconds=1.0) as generation:
        generation.sync_weights("mine")
        server.done("/pause?mode=keep", {}, headers={"X-Vgen-Lease": generation.engine.peers[0].server.lease})
        with (
            caplog.at_level(logging.WARNING, "vgen.generation"),
            at_work(lambda: generation.generate([[1]], SHORT)) as got,
        ):
            try:
                assert until(generation._watch.stalled)
            finally:
                server.done("/resume", {}, headers={"X-Vgen-Lease": generation.engine.peers[0].server.lease})
    assert got[0][0].weight_version == "mine"
    assert [record.message.partition(" has")[0] for record in caplog.records] == ["vgen: generate"]
    (stall,), (generate,) = sink.named(names.STALL), sink.named(names.GENERATE)
    assert stall.parent is generate
    (sync,) = sink.named(names.WEIGHT_SYNC)
    assert [(link.trace_id, link.span_id) for link in generate.links] == [(sync.trace_id, sync.span_id)]
    assert {request.attributes[names.FIRST_VERSION] for request in sink.named(names.REQUEST)} == {"mine"}


def test_a_servers_workers_are_asked_for_their_memory(server, sink):
    assert "memory" in server.done("/vgen/info")["features"]
    assert server.done("/collective_rpc", {"method": "vgen_memory"}) == {"results": [{}]}  # on a CPU there is none
    with connect(server, ProfilingContext([sink])) as generation:
        generation.sleep(1)
        generation.wake_up()
    for span in (*sink.named(names.SLEEP), *sink.named(names.WAKE_UP)):
        assert span.attributes[names.MEMORY_FREED] is False
        assert names.DEVICE_BYTES not in span.attributes


@pytest.mark.slow
def test_a_servers_sign_of_life_is_a_token_and_not_an_answer(server, sink, monkeypatch):
    """All completions are as long as each other: nothing arrives for long. Paused, the server still answers."""
    signs, decode = [], frames.decode_frame

    def heard(raw):
        frame = decode(raw)
        if isinstance(frame, frames.Alive):
            signs.append(frame.tokens)
        return frame

    monkeypatch.setattr(frames, "decode_frame", heard)
    with connect(server, ProfilingContext([sink]), stall_seconds=9.0) as generation:
        lease = {"X-Vgen-Lease": generation.engine.peers[0].server.lease}
        generation.generate([[1, 2]], SHORT)  # what it imports has kept this process from the clock for four seconds

        def work_for(seconds):  # by the clock: the engine is paused before it is done, however fast the machine is
            server.done("/resume", {}, headers=lease)
            time.sleep(seconds)
            server.done("/pause?mode=keep", {}, headers=lease)

        with at_work(lambda: generation.generate([[1, 2]] * 256, LONGER)) as got:
            try:
                work_for(0.3)
                assert until(lambda: len(signs) == 1)
                work_for(0.2)
                assert until(lambda: len(signs) == 2)
                went_on = not sink.named(names.STALL) and not generation._watch.stalled()
                assert len(sink.named(names.REQUEST)) == 1
                stalled = until(generation._watch.stalled, 30)
            finally:
                server.done("/resume", {}, headers=lease)
    assert signs[1] > signs[0] > 0
    assert went_on
    assert stalled
    assert len(got[0]) == 256
    assert len(sink.named(names.STALL)) == 1
