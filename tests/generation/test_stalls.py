"""Work that does not go on is said to be so while it does not, and only then."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace

import pytest
from helpers.clock import Clock
from helpers.sources import SmallSource
from helpers.threads import at_work
from helpers.waiting import wait_until

from vgen import EngineError, Generation, ProfilingContext, Sampling
from vgen.engine_protocol import EngineState
from vgen.profiling import semconv
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.testing import FakeEngine


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def pass_time(clock: Clock, seconds: float) -> None:
    """Let time pass, until the watching thread has noticed."""
    clock.advance(seconds)
    clock.wait_for("vgen-stall")


class Held(FakeEngine):
    """An engine whose calls stop at a gate, `stream` after so many completions."""

    def __init__(self, call: str, after: int = 0) -> None:
        super().__init__()
        self.call, self.after, self.reached, self.gate = call, after, threading.Event(), threading.Event()

    def hold(self) -> None:
        self.reached.set()
        assert self.gate.wait(30)

    def _call(self, call):
        super()._call(call)
        if call == self.call and call != "stream":
            self.hold()

    def stream(self, batch):
        for number, completion in enumerate(super().stream(batch)):
            if self.call == "stream" and number == self.after:
                self.hold()
            yield completion


CALLS = {
    "generate": ("stream", lambda g: g.generate([[1], [2], [3]]), [semconv.GENERATE, semconv.ENGINE_GENERATE]),
    "stream": ("stream", lambda g: list(g.stream([[1], [2], [3]])), [semconv.GENERATE]),
    "sync_weights": ("load", lambda g: g.sync_weights(), [semconv.WEIGHT_SYNC, semconv.SYNC_LOAD]),
    "sleep": ("sleep", lambda g: g.sleep(), [semconv.SLEEP]),
    "pause": ("pause", lambda g: g.pause(), [semconv.PAUSE]),
    "close": ("close", lambda g: g.close(), [semconv.ENGINE_CLOSE]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.fault(
    point="a call of `generate`",
    did="A call makes no progress",
    happens="A gauge, a span and a warning say so while it lasts",
    within=20,
)
def test_a_stall_shows_while_it_lasts_and_is_an_event_once_it_ends(call, sink, caplog, tmp_path, clock):
    held, run, spans = CALLS[call]
    engine, profiling = Held(held, after=1), ProfilingContext([sink, JsonlSink(tmp_path)])
    generation = Generation(engine, SmallSource(), profiling=profiling, stall_seconds=0.2)

    def lines(kind, name):
        records = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
        return [record for record in records if record["type"] == kind and record.get("name") == name]

    with caplog.at_level(logging.WARNING, "vgen"), at_work(lambda: run(generation)):
        assert engine.reached.wait(30)
        pass_time(clock, 0.19)
        assert not caplog.records
        pass_time(clock, 0.06)
        assert wait_until(lambda: lines("start", semconv.STALL))
        assert lines("end", semconv.STALL) == []
        assert generation.stalled_seconds == 0.25
        pass_time(clock, 0.25)  # it is reported once
        assert not sink.named(spans[0])  # still open
        said = [record.message for record in caplog.records]
        engine.gate.set()
    assert len(said) == len(caplog.records) == 1
    assert f"{call} has made no progress for 0.2 s" in said[0]
    places = [said[0].index(f"{name} (") for name in spans]
    assert places == sorted(places)
    (stall,), (root,) = sink.named(semconv.STALL), sink.named(spans[0])
    assert stall.parent is root
    assert stall.attributes[semconv.STALLED_CALL] == call
    assert stall.attributes[semconv.OPEN_SPANS] == spans
    assert root.start_ns <= stall.start_ns < stall.end_ns <= root.end_ns
    assert stall.duration == 0.5
    (event,) = [event for event in root.events if event.name == semconv.STALL_OVER]
    assert event.attributes == {semconv.STALLED_CALL: call, semconv.STALL_SECONDS: stall.duration}
    gauge = [m.values[0] for m in sink.measurements if m.instrument is semconv.STALLED]
    assert (gauge[0], gauge[-1]) == (0.25, 0.0)
    assert [m.values for m in sink.measurements if m.instrument is semconv.STALLS] == [(1,)]
    generation.close()
    profiling.close()


@pytest.mark.parametrize("signs", ["completions", "tokens", "phases"])
def test_what_goes_on_slowly_has_not_stalled(signs, sink, caplog, clock):
    class Slow(FakeEngine):
        def stream(self, batch):
            for completion in super().stream(batch):
                pass_time(clock, 0.15)
                if signs == "tokens":  # of one that is long
                    batch.on_progress()
                    continue
                yield completion
            if signs == "tokens":
                yield from super().stream(replace(batch, requests=batch.requests[:1]))

        def sync(self, source, version, trace, verify=None):
            for _ in range(5):
                with trace.phase("load"):
                    pass_time(clock, 0.15)

    generation = Generation(Slow(), SmallSource(), profiling=ProfilingContext([sink]), stall_seconds=0.2)
    with caplog.at_level(logging.WARNING, "vgen"), generation:
        if signs == "phases":
            generation.sync_weights()
            assert sink.named(semconv.WEIGHT_SYNC)[0].duration == 0.75
        else:
            generation.generate([[1]] * 10)
            assert sink.named(semconv.GENERATE)[0].duration == 1.5
    assert not caplog.records
    assert not sink.named(semconv.STALL)


def test_a_caller_that_takes_its_time_between_completions_is_no_stall(sink, clock):
    generation = Generation(FakeEngine(), SmallSource(), profiling=ProfilingContext([sink]), stall_seconds=0.1)
    with generation:
        for _ in generation.stream([[1], [2]]):
            pass_time(clock, 0.4)
    assert not sink.named(semconv.STALL)


def test_a_stall_within_a_generation_that_restores_weights_is_the_syncs(sink, clock):
    engine = Held("load")
    generation = Generation(engine, SmallSource(), profiling=ProfilingContext([sink]), stale=True, stall_seconds=0.1)
    with at_work(lambda: generation.generate([[1]])):
        assert engine.reached.wait(30)
        for _ in range(4):  # long enough for a second stall to be reported
            pass_time(clock, 0.1)
        engine.gate.set()
    (stall,) = sink.named(semconv.STALL)
    assert stall.attributes[semconv.STALLED_CALL] == "sync_weights"
    assert stall.attributes[semconv.OPEN_SPANS] == [semconv.GENERATE, semconv.WEIGHT_SYNC, semconv.SYNC_LOAD]
    generation.close()


def test_a_stall_that_ends_by_an_error_ends_with_its_call(sink, clock):
    engine = Held("sleep")
    engine.gate.wait = lambda _: pass_time(clock, 0.5)  # the assertion behind the gate fails
    with Generation(engine, SmallSource(), profiling=ProfilingContext([sink]), stall_seconds=0.1) as generation:
        with pytest.raises(EngineError):
            generation.sleep()
        assert generation.state is EngineState.FAILED
    (stall,), (root,) = sink.named(semconv.STALL), sink.named(semconv.SLEEP)
    assert stall.end_ns <= root.end_ns
    assert root.error == "EngineError"


def watchers():
    return {thread for thread in threading.enumerate() if thread.name == "vgen-stall"}


def test_one_thread_at_most_and_none_where_profiling_is_off_or_nothing_is_watched_for(sink):
    before = watchers()
    for profiling, seconds in ((ProfilingContext.disabled(), 0.1), (ProfilingContext([sink]), None)):
        with Generation(FakeEngine(), SmallSource(), profiling=profiling, stall_seconds=seconds) as generation:
            generation.generate([[1]])
            generation.sync_weights()
            assert watchers() <= before
    generation = Generation(FakeEngine(), SmallSource(), profiling=ProfilingContext([sink]), stall_seconds=0.5)
    assert watchers() <= before  # nothing has been done yet
    for _ in range(5):
        generation.generate([[1]], Sampling(max_tokens=1))
        generation.sync_weights()
    assert len(watchers() - before) == 1
    generation.close()
    assert wait_until(lambda: watchers() <= before)


def test_the_thread_ends_with_a_generation_that_nobody_closed(sink):
    before = watchers()
    generation = Generation(FakeEngine(), SmallSource(), profiling=ProfilingContext([sink]), stall_seconds=0.5)
    generation.generate([[1]])
    assert len(watchers() - before) == 1
    del generation
    assert wait_until(lambda: watchers() <= before)


def test_a_watch_that_nobody_closed_does_not_keep_the_process(profiling):
    generation = Generation(FakeEngine(), SmallSource(), profiling=profiling)
    generation.generate([[1]])
    watching = [thread for thread in threading.enumerate() if thread.name == "vgen-stall"]
    assert watching
    assert all(thread.daemon for thread in watching)
    generation.close()
