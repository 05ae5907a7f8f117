"""Spans, attributes, events, links, errors, carriers: what a context records of one thread's work."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from vgen.profiling import Instrument, Link, ProfilingContext, semconv
from vgen.profiling.sinks.memory import MemorySink

COUNTER = Instrument("test.counter", "counter")
GAUGE = Instrument("test.gauge", "gauge")
HISTOGRAM = Instrument("test.histogram", "histogram")


def test_spans_nest_and_carry_what_they_were_given(profiling: ProfilingContext, memory: MemorySink):
    with profiling.span("outer", {"a.b": 1}, c="x") as outer:
        outer.set(late=True).event("half", {"n": 2}).link(Link("f" * 32, "e" * 16), why="test")
        with profiling.span("inner") as inner:
            assert profiling.current_span() is inner
        assert profiling.current_span() is outer
    assert profiling.current_span() is None
    assert [span.name for span in memory.spans] == ["inner", "outer"]
    assert (inner.trace_id, inner.parent_id, inner.parent) == (outer.trace_id, outer.span_id, outer)
    assert outer.attributes == {"a.b": 1, "c": "x", "late": True}
    assert inner.attributes == {"a.b": 1, "c": "x"}, "what a span learns later is its own"
    assert [(event.name, event.attributes) for event in outer.events] == [("half", {"n": 2})]
    assert outer.start_ns <= outer.events[0].time_ns <= outer.end_ns
    assert [(link.trace_id, link.attributes) for link in outer.links] == [("f" * 32, {"why": "test"})]


def test_bind_copies_share_the_open_span_and_leave_the_original_alone(profiling: ProfilingContext, memory: MemorySink):
    trainer, engine = profiling.bind({"vgen.rank": 1}), profiling.bind(engine="a").bind(engine="b", device="cpu")
    with trainer.span("train", phase="rollout") as outer, engine.span("generate", own=1) as inner:
        assert (trainer.current_span(), profiling.current_span()) == (inner, inner)
        engine.record(GAUGE, 1.0, k="v")
    assert outer.attributes == {"vgen.rank": 1, "phase": "rollout"}
    assert inner.attributes == {"vgen.rank": 1, "phase": "rollout", "engine": "b", "device": "cpu", "own": 1}
    assert memory.measurements[0].attributes == {**inner.attributes, "k": "v"}
    assert memory.measurements[0].span_id == inner.span_id
    with profiling.span("bare") as bare:
        assert bare.attributes == {}


def test_contexts_side_by_side_share_nothing():
    sinks = MemorySink(), MemorySink()
    one, other = (ProfilingContext([sink]) for sink in sinks)
    with one.step(1, a=1) as step, other.span("x") as span:
        other.record(COUNTER, 5)
        assert (one.current_span(), other.current_span()) == (step, span)
    assert (span.parent, span.trace_id == step.trace_id, span.attributes) == (None, False, {})
    assert "test.counter" not in one.summary()
    assert other.summary()["test.counter"] == 5
    assert [len(sink.spans) for sink in sinks] == [1, 1]


def test_threads_nest_through_carry_and_not_without(profiling: ProfilingContext):
    together = threading.Barrier(4)

    def work(_: int) -> object:
        with profiling.span("work") as span:
            together.wait(5)
            return span.parent

    def alone() -> object:
        with profiling.span("alone") as span:
            return span.parent

    with ThreadPoolExecutor(4) as pool, profiling.span("outer") as outer:
        carried = profiling.carry(alone)
        assert list(pool.map(profiling.carry(work), range(20))) == [outer] * 20
        assert pool.submit(alone).result() is None
    assert carried() is outer, "it stays bound to where it was made"
    assert profiling.current_span() is None


async def test_a_carried_coroutine_function_runs_beneath_the_span_it_was_made_in(profiling: ProfilingContext):
    async def work() -> object:
        await asyncio.sleep(0)
        with profiling.span("work") as span:
            return span.parent

    with profiling.span("outer") as outer:
        carried = profiling.carry(work)
    assert await work() is None
    assert await carried() is outer


def test_rebuilt_spans_lie_where_they_are_told_and_say_so(profiling: ProfilingContext, memory: MemorySink):
    now = time.monotonic_ns()
    with profiling.span("engine", model="m") as engine:
        pass
    with profiling.span("outer") as outer:
        profiling.rebuilt("request", now - 10, now, {"n": 1}, parent=engine)
        profiling.rebuilt("other", now, now + 5, error="Timeout")
        assert profiling.current_span() is outer
    _, request, other, _ = memory.spans
    assert (request.parent, request.start_ns, request.end_ns, request.current) == (engine, now - 10, now, False)
    assert request.attributes == {"model": "m", "n": 1, semconv.REBUILT: True}
    assert (other.parent, other.error, other.duration) == (outer, "Timeout", 5e-9)
    assert not memory.open


def test_disabled_takes_everything_and_keeps_nothing():
    off = ProfilingContext.disabled()
    assert not off.enabled
    assert off.bind(a=1) is off
    with off.step(1) as step, off.span("x", a=1) as span:
        span.set(b=2).event("e").link(span)
        off.record(COUNTER, 1)
        off.record_many(HISTOGRAM, [1, 2])
        off.observe(GAUGE, lambda: 1.0)
        off.rebuilt("y", 0, 1)
        assert (off.current_span(), off.carrier(), off.summary(), step.summary()) == (None, {}, {}, {})
    assert span.attributes == {}
    assert off.run.summary() == {}
    assert (off.flush(), off.close(), off.dropped()) == (True, True, {})

    def function() -> None: ...

    assert off.span("x")(function) is function
    assert not pickle.loads(pickle.dumps(off)).enabled


def test_a_copied_configuration_holds_the_same_context(profiling: ProfilingContext):
    held = {"profiling": profiling}
    assert copy.deepcopy(held)["profiling"] is profiling
    assert copy.copy(profiling) is profiling


def test_the_span_of_a_disabled_context_is_empty_and_belongs_to_no_trace():
    with ProfilingContext.disabled().span("x") as span:
        span.set(a=1).event("b").link(span)
    assert (span.sampled, span.current, span.attributes, span.events, span.links) == (False, False, {}, (), ())
    assert (span.trace_id, span.span_id, span.parent_id, span.parent, span.step) == (
        "0" * 32,
        "0" * 16,
        None,
        None,
        None,
    )
    assert (span.start_ns, span.end_ns, span.error) == (0, 0, None)
