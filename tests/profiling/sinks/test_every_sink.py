"""What every sink keeps to: the same suite for all of them."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.every_sink import SINKS

from vgen.profiling import Instrument, ProfilingContext, Sink, semconv
from vgen.testing import MemorySink

COUNTER = Instrument("tests.counter", "counter")
GAUGE = Instrument("tests.gauge", "gauge", "By")
HISTOGRAM = Instrument("tests.histogram", "histogram", "s")
ODD = {
    "text": "ünïcødé \u2028 \x00 \ud800",
    "nan": math.nan,
    "infinite": -math.inf,
    "huge": 1 << 80,
    "many": ["a", "b"],
    "mixed": (1, "b", None),
    "empty": [],
    "nothing": None,
    "bytes": b"\xff",
    "set": {1},
    "object": object(),
    "long": "x" * 100_000,
    "": "no name",
    "with space": 1,
}


@pytest.fixture(params=list(SINKS))
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Sink:
    return SINKS[request.param](tmp_path)


@pytest.fixture
def witness() -> MemorySink:
    return MemorySink()


@pytest.fixture
def profiling(sink: Sink, witness: MemorySink) -> ProfilingContext:
    return ProfilingContext([sink, witness])


def healthy(profiling: ProfilingContext, witness: MemorySink, refused: dict[str, int] | None = None) -> None:
    """Afterwards all is as before: nothing dropped but what is said, no sink switched off, spans recorded still."""
    before = len(witness.spans)
    with profiling.step(99), profiling.span("after"):
        profiling.record(COUNTER, 1)
    assert [span.name for span in witness.spans[before:]] == ["after", semconv.STEP]
    assert profiling.flush(30)
    assert profiling.dropped() == (refused or {})
    assert profiling.close(30)
    assert profiling.close()


def test_nested_spans_errors_events_links_and_every_kind_of_measurement(profiling, witness):
    first = None
    for number in range(3):
        with profiling.step(number) as step:
            with profiling.span("outer", a=1) as outer, profiling.span("inner", {"dotted.name": True}) as inner:
                outer.set(result=2.5)
                inner.event("happened", n=1)
                inner.link(first or outer, why="because")
            profiling.rebuilt(semconv.REQUEST, step.start_ns, step.start_ns + 1000, {"x": 1}, parent=outer)
            profiling.rebuilt(semconv.REQUEST, step.start_ns, step.start_ns + 1000, error="OSError")
            with pytest.raises(OSError, match="gone"), profiling.span("failing"):
                raise OSError("gone")
            profiling.record(COUNTER, 2)
            profiling.record(GAUGE, 3.5, label="a")
            profiling.record_many(HISTOGRAM, [0.1, 0.2, 0.3])
            first = first or outer
    assert len(witness.spans) == 3 * 6
    assert len({span.span_id for span in witness.spans}) == 3 * 6
    assert witness.rows[0][1]["tests.histogram.count"] == 3
    healthy(profiling, witness)


def test_values_that_are_no_numbers_and_attributes_that_are_no_attributes(profiling, witness, sink):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with profiling.step(1), profiling.span("odd", ODD) as span:
            span.set(ODD)
            span.event("odd", ODD)
            for instrument in (COUNTER, GAUGE, HISTOGRAM):
                for value in (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e308, 1e-308):
                    profiling.record(instrument, value)
            profiling.record_many(HISTOGRAM, [])
    # OpenTelemetry has no way to hold four of a counter's and a histogram's values and three of a gauge's
    healthy(profiling, witness, {"OTelSink": 11} if type(sink).__name__ == "OTelSink" else {})


def test_many_threads_at_once(profiling, witness):
    def work(n: int) -> None:
        for k in range(20):
            with profiling.span(f"thread-{n}", k=k), profiling.span("child"):
                profiling.record(COUNTER, 1)

    with profiling.step(1), ThreadPoolExecutor(8) as pool:
        list(pool.map(profiling.carry(work), range(8)))
    assert len(witness.spans) == 8 * 20 * 2 + 1
    assert witness.rows[0][1]["tests.counter"] == 160
    healthy(profiling, witness)


def test_tasks_that_take_turns(profiling, witness):
    async def work(n: int) -> None:
        async with profiling.span("task", n=n):
            await asyncio.sleep(0.001 * (n % 3))
            with profiling.span("child"):
                await asyncio.sleep(0)

    async def everybody() -> None:
        await asyncio.gather(*(work(n) for n in range(20)))

    with profiling.step(1):
        asyncio.run(everybody())
    assert len([span for span in witness.spans if span.parent is not None and span.parent.name == "task"]) == 20
    healthy(profiling, witness)


def test_a_span_that_ends_on_another_thread(profiling, witness):
    maker = profiling.span("travels")
    maker.__enter__()
    thread = threading.Thread(target=maker.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert witness.named("travels")
    with profiling.span("still open"):
        pass
    gc.collect()


def test_nothing_is_too_late_for_a_closed_sink(profiling, witness):
    with profiling.step(1):
        pass
    assert profiling.close()
    with profiling.step(2), profiling.span("late"):
        profiling.record(COUNTER, 1)
    profiling.flush(0.5)
    profiling.close()


def test_two_contexts_with_sinks_of_their_own_share_nothing(sink, tmp_path):
    mine, other = ProfilingContext([sink, a := MemorySink()]), ProfilingContext([b := MemorySink()])
    with mine.span("mine"), other.span("other"):
        pass
    assert a.spans[0].parent is None
    assert b.spans[0].parent is None
    assert a.spans[0].trace_id != b.spans[0].trace_id
    mine.close()
    other.close()
