"""Spans, attributes, events, links, errors, carriers: what a context records of one thread's work."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import logging
import pickle
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from vgen.profiling import Instrument, Link, ProfilingContext, names
from vgen.profiling.content import ContentCapture
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


def test_a_span_that_has_ended_does_not_change(profiling: ProfilingContext):
    with profiling.span("x") as span:
        pass
    span.set(a=1).event("e").link(span)
    assert (span.attributes, span.events, span.links) == ({}, (), ())


def test_times_are_monotonic_and_anchored_to_the_wall_clock(profiling: ProfilingContext):
    before, start = time.time_ns(), time.perf_counter()
    with profiling.span("outer") as outer, profiling.span("inner") as inner:
        time.sleep(0.01)
    took, after = time.perf_counter() - start, time.time_ns()
    assert 0.01 <= inner.duration <= outer.duration <= took
    assert outer.offset_ns == inner.offset_ns
    assert before - 1_000_000 <= outer.start_unix_ns <= outer.end_unix_ns <= after + 1_000_000


def test_of_an_error_the_type_is_recorded_and_never_what_it_says(profiling: ProfilingContext, memory: MemorySink):
    with pytest.raises(ValueError, match="secret"), profiling.span("outer"), profiling.span("inner"):
        raise ValueError("the secret prompt")
    assert [span.error for span in memory.spans] == ["ValueError", "ValueError"]
    told = [(s.name, s.error, s.attributes, s.events, s.links) for s in memory.spans]
    assert "secret" not in repr(told)


def test_an_error_that_cannot_be_printed_is_still_the_one_that_is_raised():
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    sink = MemorySink()
    profiling = ProfilingContext([sink], capture=ContentCapture())
    with pytest.raises(Mute), profiling.span("x"):
        raise Mute
    assert (sink.spans[0].error, sink.spans[0].attributes) == ("Mute", {names.EXCEPTION_MESSAGE: "<Mute>"})


def test_a_failing_span_leaves_its_context_as_it_was(profiling: ProfilingContext):
    with profiling.span("outer") as outer:
        with pytest.raises(KeyboardInterrupt), profiling.span("inner"):
            raise KeyboardInterrupt
        assert profiling.current_span() is outer


def test_a_decorator_times_every_call(profiling: ProfilingContext, memory: MemorySink):
    @profiling.span("work", kind="test")
    def work(depth: int) -> int:
        """Docstring."""
        return work(depth - 1) + 1 if depth else 0

    assert (work(2), work.__name__, work.__doc__) == (2, "work", "Docstring.")
    innermost, middle, outermost = memory.spans
    assert (innermost.parent, middle.parent, outermost.parent) == (middle, outermost, None)
    assert all(span.attributes == {"kind": "test"} for span in memory.spans)


async def test_a_decorator_of_a_coroutine_function_covers_its_awaits(profiling: ProfilingContext, memory: MemorySink):
    class Callable:
        async def __call__(self) -> None:
            await asyncio.sleep(0.01)

    @profiling.span("work")
    async def work() -> None:
        await asyncio.sleep(0.01)

    assert inspect.iscoroutinefunction(work)
    await asyncio.gather(work(), work())
    await profiling.span("object")(Callable())()
    assert [span.parent for span in memory.spans] == [None, None, None]
    assert all(span.duration >= 0.009 for span in memory.spans)


@pytest.mark.parametrize("off", [True, False])
def test_a_generator_cannot_be_decorated(off: bool):
    profiling = ProfilingContext.disabled() if off else ProfilingContext()

    def generator():
        yield 1

    async def async_generator():
        yield 1

    for function in (generator, async_generator):
        for decorate in (profiling.span("x"), profiling.step(1), *(() if off else (profiling.carry,))):
            with pytest.raises(TypeError, match="generator"):
                decorate(function)


async def test_async_with_works_like_with(profiling: ProfilingContext, memory: MemorySink):
    async with profiling.step(1) as step, profiling.span("x") as span:
        await asyncio.sleep(0)
    assert span.parent is step
    assert memory.rows == [(1, step.summary())]


def test_one_maker_may_be_entered_again_while_it_is_open(profiling: ProfilingContext, memory: MemorySink):
    maker = profiling.span("x")
    with maker as outer, maker as inner:
        assert inner.parent is outer
    with maker as later:
        pass
    assert memory.spans == [inner, outer, later]
    assert later.parent is None


def test_spans_may_end_out_of_order(profiling: ProfilingContext, memory: MemorySink):
    first, second = profiling.span("first"), profiling.span("second")
    outer, inner = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    with profiling.span("third") as third:
        assert third.parent is None
    second.__exit__(None, None, None)
    assert profiling.current_span() is None
    assert memory.spans == [outer, third, inner]


async def test_a_span_that_is_closed_from_another_task_ends_once(profiling: ProfilingContext, memory: MemorySink):
    async def fixture():
        async with profiling.span("x"):
            yield

    opened = fixture()
    await asyncio.create_task(anext(opened))  # type: ignore[arg-type]
    with profiling.span("y") as other:
        await opened.aclose()
        assert profiling.current_span() is other
    assert [(span.name, span.error) for span in memory.spans] == [("x", "GeneratorExit"), ("y", None)]


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


def test_a_parents_attributes_may_be_set_from_many_threads(profiling: ProfilingContext):
    def work(worker: int) -> None:
        for n in range(200):
            outer.set({f"{worker}.{n}": n}).event("e").link(outer)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool, profiling.span("outer") as outer:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(outer.attributes) == len(outer.events) == len(outer.links) == 800


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
    assert request.attributes == {"model": "m", "n": 1, names.REBUILT: True}
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


# What telemetry cannot hold ----------------------------------------------------------------------------------------


class Tensor:
    """Like a tensor on a device: to print it, or to make it a number, is to wait for the device."""

    device = "cuda:0"

    def __str__(self) -> str:
        raise AssertionError("the device was waited for")

    __repr__ = __float__ = __str__  # type: ignore[assignment]


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no")

    @property
    def device(self) -> str:
        raise RuntimeError("no")


class Colour(str, Enum):  # noqa: UP042 - whose `str` is not its value
    RED = "red"


class Odd:
    def __str__(self) -> str:
        return "odd"


VALUES: list[tuple[object, object]] = [
    (True, True),
    (2**80, 2**80),
    (np.float32(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (Colour.RED, "red"),
    (Path("/a/b"), "/a/b"),
    (Tensor(), "<Tensor>"),
    (Broken(), "<Broken>"),
    (Odd(), "odd"),
    ([1, 2], [1, 2]),
    (("a", None), ["a", None]),
    ([Tensor(), 1, np.float64(2)], ["<Tensor>", 1, 2.0]),
    ([[1], [2]], ["[1]", "[2]"]),
    ({"a": [1]}, '{"a": [1]}'),
    ({"a": Tensor()}, "<dict>"),
    ({1, 2}, "<set>"),
    (b"prompt", "<bytes>"),
]


@pytest.mark.parametrize(("value", "recorded"), VALUES, ids=lambda value: type(value).__name__)
def test_odd_attributes_are_recorded_as_something_simple(profiling: ProfilingContext, value: object, recorded: object):
    with profiling.span("x", a=value) as span:
        span.set(b=value).event("e", c=value).link(span, d=value)
        profiling.record(COUNTER, 1, e=value)
    circular: list[object] = []
    circular.append(circular)
    with profiling.span("x", a=circular):
        pass
    assert span.attributes == {"a": recorded, "b": recorded}
    assert type(span.attributes["a"]) is type(recorded)
    assert (span.events[0].attributes, span.links[0].attributes) == ({"c": recorded}, {"d": recorded})


def test_an_unknown_type_is_reported_once(profiling: ProfilingContext, caplog: pytest.LogCaptureFixture):
    class Unknown:
        pass

    class Other:
        pass

    for _ in range(5):
        with profiling.span("x", first=Unknown()):
            profiling.record(COUNTER, 1, second=Unknown())
    with profiling.span("x", other=Other()):
        pass
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    assert "Unknown" in told[0]
    assert "'first'" in told[0]
    assert "Other" in told[1]


def test_none_is_left_out_and_keys_become_strings(profiling: ProfilingContext):
    with profiling.span("x", {1: "a", "b": None, Colour.RED: 2, Tensor(): 3}) as span:  # type: ignore[dict-item]
        pass
    assert span.attributes == {"1": "a", "red": 2, "<Tensor>": 3}


def test_what_is_no_number_is_measured_as_nan(profiling: ProfilingContext, memory: MemorySink):
    profiling.record_many(HISTOGRAM, [1, 2.5, True, np.float32(0.5), 10**400, -(10**400), Tensor(), "?", None])  # type: ignore[list-item]
    assert [repr(value) for value in memory.measurements[0].values] == [
        "1", "2.5", "1", "0.5", "inf", "-inf", "nan", "nan", "nan",
    ]  # fmt: skip
    profiling.record(COUNTER, Tensor())  # type: ignore[arg-type]
    profiling.record(GAUGE, np.float64(3))
    summary = profiling.summary()
    assert (summary["test.histogram.count"], summary["test.histogram.nonfinite"]) == (4, 5)
    assert (summary["test.counter.nonfinite"], summary["test.gauge"]) == (1, 3.0)
    assert type(summary["test.gauge"]) is float


# Other processes ---------------------------------------------------------------------------------------------------

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_the_carrier_is_the_open_span_as_traceparent(profiling: ProfilingContext):
    assert profiling.carrier() == {}
    with profiling.span("x") as span:
        assert profiling.carrier() == {"traceparent": f"00-{span.trace_id}-{span.span_id}-01"}
        span.sampled = False
        assert profiling.carrier()["traceparent"].endswith("-00")


@pytest.mark.parametrize("header", [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-03", f"cc-{TRACE}-{SPAN}-01-more"])
def test_roots_lie_beneath_a_remote_parent(memory: MemorySink, header: str):
    profiling = ProfilingContext([memory], {"vgen.rank": 2}, parent={"traceparent": header})
    assert profiling.carrier() == {"traceparent": f"00-{TRACE}-{SPAN}-01"}, "the parent goes on to whoever comes next"
    with profiling.step(1) as step, profiling.span("x") as span:
        pass
    assert (step.trace_id, step.parent_id, step.parent, step.sampled) == (TRACE, SPAN, None, True)
    assert (span.trace_id, span.parent_id) == (TRACE, step.span_id)
    now = time.monotonic_ns()
    profiling.rebuilt("y", now, now)
    assert memory.spans[-1].parent_id == SPAN
    assert not profiling.bind(a=1)._core.remote.sampled or header.endswith(("1", "3", "more"))


def test_the_sampled_flag_travels():
    profiling = ProfilingContext(parent={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    with profiling.span("x") as span:
        assert not span.sampled
        assert profiling.carrier()["traceparent"].endswith("-00")


MALFORMED = [
    "",
    "x",
    f"00-{TRACE}-{SPAN}",
    f"00-{TRACE}-{SPAN}-01-more",
    f"00-{TRACE}-{SPAN}-01 ",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{TRACE[:-1]}-{SPAN}-01",
    17,
    b"00",
]


@pytest.mark.parametrize("header", MALFORMED, ids=str)
def test_a_malformed_carrier_is_passed_over_with_one_warning(caplog: pytest.LogCaptureFixture, header: object):
    profiling = ProfilingContext(parent={"traceparent": header})  # type: ignore[dict-item]
    for _ in range(2):
        with profiling.span("x") as span:
            pass
    assert span.parent_id is None
    assert len(caplog.records) == 1
    assert "traceparent" in caplog.text


@pytest.mark.parametrize("parent", [None, {}, {"tracestate": "a=b"}])
def test_without_a_traceparent_nothing_is_said(caplog: pytest.LogCaptureFixture, parent: dict[str, str] | None):
    with ProfilingContext(parent=parent).span("x") as span:
        assert span.parent_id is None
    assert not caplog.records


def test_a_carrier_of_no_mapping_is_passed_over(caplog: pytest.LogCaptureFixture):
    with ProfilingContext(parent=f"00-{TRACE}-{SPAN}-01").span("x") as span:  # type: ignore[arg-type]
        assert span.parent_id is None
    assert len(caplog.records) == 1


def test_a_pickled_context_arrives_without_sinks_beneath_the_open_span(profiling: ProfilingContext, memory: MemorySink):
    bound = profiling.bind(vgen_rank=3)
    with bound.span("outer") as outer:
        one, other = pickle.loads(pickle.dumps((bound, bound.bind(b=1))))
    with one.span("remote") as remote, other.span("inner") as inner:
        one.record(COUNTER, 2)
    assert (remote.trace_id, remote.parent_id, remote.parent) == (outer.trace_id, outer.span_id, None)
    assert remote.attributes == {"vgen_rank": 3}
    assert (inner.parent, inner.attributes) == (remote, {"vgen_rank": 3, "b": 1}), "copies stay copies of each other"
    assert one.summary()["test.counter"] == 2
    assert memory.spans == [outer]
    assert "test.counter" not in profiling.summary()
    assert pickle.loads(pickle.dumps(profiling)).carrier() == {}


def test_a_copied_configuration_holds_the_same_context(profiling: ProfilingContext):
    held = {"profiling": profiling}
    assert copy.deepcopy(held)["profiling"] is profiling
    assert copy.copy(profiling) is profiling


# Observed gauges ---------------------------------------------------------------------------------------------------


def test_what_is_observed_is_read_at_the_end_of_a_step_into_its_row(profiling: ProfilingContext, memory: MemorySink):
    profiling.bind(engine="a").observe(GAUGE, iter([1.0, 2.0, 3.0]).__next__)
    with profiling.step(1) as first, profiling.step(2) as second:
        pass
    assert (second.summary()["test.gauge"], first.summary()["test.gauge"]) == (1.0, 2.0)
    assert [m.attributes for m in memory.measurements] == [
        {names.STEP_NUMBER: 2, "engine": "a"}, {names.STEP_NUMBER: 1, "engine": "a"},
    ]  # fmt: skip
    assert [m.span_id for m in memory.measurements] == [second.span_id, first.span_id]


async def test_a_step_that_is_closed_from_another_task_gets_its_own_gauges(profiling: ProfilingContext):
    async def fixture():
        with profiling.step(1) as step:
            yield step

    profiling.observe(GAUGE, lambda: 4.0)
    opened = fixture()
    step = await asyncio.create_task(anext(opened))  # type: ignore[arg-type]
    await opened.aclose()
    assert step.summary()["test.gauge"] == 4.0
    assert profiling.summary()["test.gauge"] == 4.0


def test_an_observed_object_is_not_kept_alive(profiling: ProfilingContext):
    class Engine:
        def age(self) -> float:
            return 1.0

    engine = Engine()
    gone = weakref.ref(engine)
    profiling.observe(GAUGE, engine.age)
    del engine
    gc.collect()
    assert gone() is None
    with profiling.step(1) as step:
        pass
    assert "test.gauge" not in step.summary()


def test_a_failing_callback_costs_its_value_and_one_warning(profiling: ProfilingContext, caplog):
    def broken() -> float:
        raise OSError("http://user:password@host")

    profiling.observe(GAUGE, broken)
    profiling.observe(Instrument("test.other", "gauge"), lambda: 7.0)
    for number in range(3):
        with profiling.step(number) as step:
            pass
    assert step.summary()["test.other"] == 7.0
    assert "test.gauge" not in step.summary()
    assert len(caplog.records) == 1
    assert "test.gauge" in caplog.text
    assert "password" not in caplog.text


# Lifetimes ---------------------------------------------------------------------------------------------------------


def test_who_keeps_a_span_does_not_keep_the_context_alive(memory: MemorySink):
    profiling = ProfilingContext([memory])
    with profiling.span("x"):
        pass
    core = weakref.ref(profiling._core)
    del profiling
    gc.collect()
    assert core() is None


def test_two_identity_sinks_are_refused():
    class One(MemorySink):
        def identify(self, span: object) -> bool:
            return False

    class Two(One):
        pass

    with pytest.raises(ValueError, match="One and Two"):
        ProfilingContext([One(), Two()])


def test_many_threads_each_have_a_trace_of_their_own(profiling: ProfilingContext, memory: MemorySink):
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            with profiling.span("outer") as outer, profiling.span("inner") as inner:
                assert inner.parent is outer

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(memory.spans) == 3200
    assert len({span.span_id for span in memory.spans}) == 3200
    assert len({span.trace_id for span in memory.spans}) == 1600
    assert profiling.summary()["outer.duration.count"] == 1600
