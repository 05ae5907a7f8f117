"""Between the context and its sinks: order, isolation, the bounded queue, deadlines, and losses counted."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.sinks import RECORDS, Gate, Recorder, faulty
from helpers.waiting import wait_until

from vgen.profiling import Instrument, ProfilingContext, Sink, Span, Step, semconv, sink_pipeline
from vgen.profiling.sink_pipeline import MAX_FAILURES, MAX_QUEUE
from vgen.profiling.sinks.memory import MemorySink

COUNTER = Instrument("tokens", "counter")
GAUGE = Instrument("rate", "gauge")
Make = Callable[..., ProfilingContext]


def exercise(profiling: ProfilingContext, number: int = 1) -> Step:
    """Something for every method of a sink."""
    with profiling.step(number) as step, profiling.span("work"):
        profiling.record(COUNTER, 1)
    return step


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_queued_sink_gets_everything_in_order_on_one_thread_of_its_own(contexts: Make):
    sink = Recorder()
    profiling = contexts(sink)
    exercise(profiling)
    assert profiling.flush()
    assert sink.records() == [
        ("start", "train.step"), ("start", "work"), ("measurement", "tokens"), ("end", "work"),
        ("end", "train.step"), ("step", "1"),
    ]  # fmt: skip
    assert sink.told[-2:] == [("idle", ""), ("flush", "")]
    assert len(sink.threads) == 1
    assert threading.get_ident() not in sink.threads


def test_records_arrive_without_a_flush_at_the_next_look_into_the_queue(contexts: Make):
    sink = Recorder()
    profiling = contexts(sink)
    profiling.flush()
    sink.told.clear()
    exercise(profiling)
    wait_until(lambda: ("idle", "") in sink.told)
    assert len(sink.records()) == 6
    assert sink_pipeline.POLL_SECONDS <= 0.1


def test_what_a_sink_does_not_override_costs_no_thread(contexts: Make):
    class Steps(Sink):
        def on_step(self, step: Step) -> None:
            pass

    before = threading.active_count()
    profiling = contexts(Steps(), MemorySink())
    with profiling.span("x"):
        pass
    assert profiling.flush()
    assert threading.active_count() == before


@pytest.mark.fault(
    point="a telemetry sink's methods",
    did="A slow sink's queue is full",
    happens="New records are dropped and counted",
    within=20,
)
def test_a_full_queue_drops_the_newest_and_counts_them(contexts: Make, memory: MemorySink):
    gate = Gate()
    sink = faulty("on_start", gate)
    profiling = contexts(sink, memory)
    surplus = 1000
    with profiling.step(1) as step:
        assert gate.reached.wait(5)
        for _ in range((MAX_QUEUE + surplus) // 2):  # whoever waited for the queue would wait for the gate
            with profiling.span("x"):
                pass
    assert profiling.dropped() == {"Faulty": surplus + 1}, "and the step's own end"
    assert step.summary()[semconv.DROPPED.name] == surplus, "the counter is read before the step itself ends"
    [told] = [m for m in memory.measurements if m.instrument is semconv.DROPPED]
    assert (told.values, told.attributes[semconv.SINK]) == ((surplus,), "Faulty")
    gate.open()
    assert profiling.flush(20)
    assert len(sink.ended) == MAX_QUEUE // 2  # type: ignore[attr-defined]
    assert exercise(profiling, 2).summary()[semconv.DROPPED.name] == 1
    assert semconv.DROPPED.name not in exercise(profiling, 3).summary(), "each loss is told of once"
    assert profiling.summary()[semconv.DROPPED.name] == surplus + 1


def test_the_worker_is_woken_before_the_queue_is_full(contexts: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sink_pipeline, "POLL_SECONDS", 30.0)
    sink = Recorder()
    profiling = contexts(sink)
    for _ in range(sink_pipeline.WAKE_AT):
        with profiling.span("x"):
            pass
    wait_until(lambda: sink.told)


def test_idle_comes_also_while_the_queue_does_not_run_empty(contexts: Make, monkeypatch: pytest.MonkeyPatch):
    gate, seconds = Gate(), 0.0

    class Slow(Recorder):
        def on_start(self, span: Span, attributes: object) -> None:  # type: ignore[override]
            gate()

        def on_end(self, span: Span) -> None:
            nonlocal seconds
            super().on_end(span)
            seconds += 0.001

    monkeypatch.setattr(sink_pipeline, "time", SimpleNamespace(monotonic=lambda: seconds))
    sink = Slow()
    profiling = contexts(sink)
    for _ in range(1000):
        with profiling.span("x"):
            pass
    gate.open()
    wait_until(lambda: len(sink.records()) == 1000)
    idle = [place for place, told in enumerate(sink.told) if told[0] == "idle"]
    assert idle[2] < 2 + 900, "the third comes before the queue is empty"


def test_a_flush_ends_while_others_go_on_recording(contexts: Make):
    sink, stop = Recorder(), threading.Event()
    profiling = contexts(sink)

    def work() -> None:
        while not stop.is_set():
            with profiling.span("x"):
                pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with profiling.span("mine"):
            pass
        assert profiling.flush(5)
        assert ("end", "mine") in sink.told
    finally:
        stop.set()
        thread.join()


# Sinks that raise --------------------------------------------------------------------------------------------------


def fail() -> None:
    raise RuntimeError("what was said: secret")


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("method", RECORDS)
@pytest.mark.fault(
    point="a telemetry sink's methods",
    did="A sink raises in every call",
    happens="It is switched off with one warning; others go on",
    within=20,
)
def test_a_failing_sink_is_switched_off_with_one_warning_and_others_go_on(
    contexts: Make, caplog: pytest.LogCaptureFixture, method: str, inline: bool
):
    memory = MemorySink()
    profiling = contexts(faulty(method, fail, inline=inline), memory)
    for number in range(MAX_FAILURES + 5):
        exercise(profiling, number)
    assert profiling.flush() is inline, "one that is switched off and has something to hand on cannot"
    assert len(memory.rows) == MAX_FAILURES + 5
    assert profiling.dropped()["Faulty"] >= MAX_FAILURES
    [told] = warnings(caplog)
    assert "Faulty" in told
    assert "RuntimeError" in told
    assert "secret" not in told
    profiling.close()
    assert [text for text in warnings(caplog) if "switched off" in text] == [told]


@pytest.mark.parametrize("inline", [True, False])
def test_a_sink_that_fails_now_and_then_is_kept_and_its_losses_counted(contexts: Make, caplog, inline: bool):
    calls = iter(range(10_000))

    def sometimes() -> None:
        if next(calls) % MAX_FAILURES:
            raise RuntimeError

    memory = MemorySink()
    profiling = contexts(faulty("on_start", sometimes, inline=inline), memory)
    for _ in range(5 * MAX_FAILURES):
        with profiling.span("x"):
            pass
    assert profiling.flush()
    assert profiling.dropped() == {"Faulty": 5 * (MAX_FAILURES - 1)}
    assert not warnings(caplog)


def test_failures_in_a_row_are_counted_for_each_method(contexts: Make, caplog: pytest.LogCaptureFixture):
    """What works must not hide what never does."""
    sink = faulty("on_start", fail)
    profiling = contexts(sink)
    for _ in range(MAX_FAILURES):
        with profiling.span("x"):
            pass
    profiling.flush()
    assert len(warnings(caplog)) == 1
    assert len(sink.ended) == MAX_FAILURES - 1  # type: ignore[attr-defined]


def test_one_warning_also_when_many_threads_see_it_fail(contexts: Make, caplog: pytest.LogCaptureFixture):
    profiling = contexts(faulty("on_end", fail, inline=True))

    def work() -> None:
        for _ in range(200):
            with profiling.span("x"):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("command", ["flush", "close"])
@pytest.mark.parametrize("inline", [True, False])
def test_a_failing_flush_or_close_is_false_and_no_more(contexts: Make, command: str, inline: bool):
    memory = MemorySink()
    profiling = contexts(faulty(command, fail, inline=inline), memory)
    exercise(profiling)
    assert getattr(profiling, command)() is False
    assert len(memory.rows) == 1


@pytest.mark.parametrize("odd", [SystemExit, KeyboardInterrupt, GeneratorExit, type("Panic", (BaseException,), {})])
@pytest.mark.fault(
    point="a telemetry sink's methods",
    did="A sink raises `SystemExit` or `KeyboardInterrupt`",
    happens="Its worker goes on",
    within=20,
)
def test_no_exception_of_any_kind_ends_the_worker(contexts: Make, odd: type[BaseException]):
    def fail_oddly() -> None:
        if next(calls) < MAX_FAILURES - 1:
            raise odd

    calls = iter(range(100))
    sink = faulty("on_start", fail_oddly)
    profiling = contexts(sink)
    for _ in range(MAX_FAILURES + 3):
        with profiling.span("x"):
            pass
    assert profiling.flush()
    assert len(sink.ended) == MAX_FAILURES + 3  # type: ignore[attr-defined]
    assert profiling.dropped() == {"Faulty": MAX_FAILURES - 1}


def test_a_request_to_stop_goes_through_an_inline_sink_to_the_work(contexts: Make, memory: MemorySink):
    """Ctrl-C, or a signal handler that exits, may strike while a sink is called: it is meant for the program."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    profiling = contexts(faulty("on_start", interrupted, inline=True), memory)
    with pytest.raises(KeyboardInterrupt), profiling.span("x"):
        pass
    assert profiling.current_span() is None
    with pytest.raises(KeyboardInterrupt):
        profiling.span("y").__enter__()
    profiling.record(COUNTER, 1)
    assert memory.measurements, "the context is not left muted"


def test_a_failing_identity_leaves_a_span_with_ids_of_its_own(contexts: Make, memory: MemorySink):
    class Broken(Sink):
        inline = True

        def identify(self, span: Span) -> bool:
            raise RuntimeError

    profiling = contexts(Broken(), memory)
    with profiling.span("outer") as outer, profiling.span("inner") as inner:
        pass
    assert (inner.trace_id, inner.parent_id) == (outer.trace_id, outer.span_id)
    assert len(outer.trace_id) == 32


# Sinks that block --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*RECORDS, "on_idle"])
@pytest.mark.fault(
    point="a telemetry sink's methods",
    did="A sink blocks for ever",
    happens="The work goes on; `close` ends at its deadline",
    within=20,
)
def test_a_blocking_sink_costs_the_work_nothing_and_close_its_deadline(contexts: Make, caplog, waits: Any, method: str):
    gate, other = Gate(), Recorder()
    profiling = contexts(faulty(method, gate), other)
    exercise(profiling)
    assert gate.reached.wait(5)
    for number in range(100):  # work that waited for the sink would wait for the gate
        exercise(profiling, number)
    assert profiling.flush(0.1) is False
    assert 0 < sum(waits) < 0.11
    waits.clear()
    waits.meanwhile = lambda: wait_until(lambda: not any(t.name == "vgen-Recorder" for t in threading.enumerate()))
    assert profiling.close(0.1) is False
    assert 0 < sum(waits) < 0.11
    assert profiling.dropped()["Faulty"] >= 100
    assert "Other" not in profiling.dropped()
    assert ("step", "99") in other.told
    assert other.told[-1] == ("close", ""), "the other one is closed while it is waited for"
    assert [text for text in warnings(caplog) if "Faulty" in text] == [caplog.messages[-1]]
    gate.open()


def test_the_record_that_a_sink_hangs_over_is_lost_too(contexts: Make):
    gate = Gate()
    profiling = contexts(faulty("on_measurement", gate))
    profiling.record(COUNTER, 1)
    assert gate.reached.wait(5)
    profiling.close(0.1)
    assert profiling.dropped() == {"Faulty": 1}
    gate.open()


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("command", ["flush", "close"])
def test_a_blocking_flush_or_close_is_left_behind_in_time(contexts: Make, waits: Any, command: str, inline: bool):
    gate = Gate()
    profiling = contexts(faulty(command, gate, inline=inline))
    exercise(profiling)
    assert getattr(profiling, command)(0.2) is False
    assert 0 < sum(waits) < 0.21
    waits.clear()
    profiling.close(0.2)
    assert sum(waits) < 0.21
    gate.open()


def test_many_hanging_sinks_share_one_deadline(contexts: Make, waits: Any):
    gate = Gate()
    profiling = contexts(*[faulty("on_end", gate) for _ in range(5)])
    exercise(profiling)
    assert profiling.close(0.3) is False
    assert len(waits) == 5
    assert sum(waits) < 0.31
    assert profiling.dropped()["Faulty"] >= 5, "sinks of one class are counted together"
    gate.open()


def test_a_sink_that_wakes_up_after_it_was_left_behind_is_told_nothing_more(contexts: Make):
    gate = Gate()

    class Sleeper(Recorder):
        def on_start(self, span: Span, attributes: object) -> None:  # type: ignore[override]
            gate()

    sink = Sleeper()
    profiling = contexts(sink)
    for number in range(100):
        exercise(profiling, number)
    profiling.close(0.1)
    lost = profiling.dropped()
    gate.open()
    wait_until(lambda: not any(thread.name == "vgen-Sleeper" for thread in threading.enumerate()))
    assert (sink.told, profiling.dropped()) == ([], lost)


def test_a_flush_that_comes_while_the_sink_is_closed_does_not_wait_for_its_deadline(contexts: Make):
    gate = Gate()
    profiling = contexts(faulty("close", gate))
    closing = threading.Thread(target=profiling.close, args=(5,))
    closing.start()
    assert gate.reached.wait(5)
    flushing = threading.Thread(target=profiling.flush, args=(30,))
    flushing.start()
    wait_until(lambda: sys._current_frames()[flushing.ident].f_code.co_name == "wait")  # type: ignore[index]
    gate.open()
    for thread in (closing, flushing):
        thread.join(5)
        assert not thread.is_alive()


# Closing -----------------------------------------------------------------------------------------------------------


def test_close_delivers_what_waits_and_nothing_comes_after(contexts: Make):
    sink, inline = Recorder(), MemorySink()
    profiling = contexts(sink, inline)
    exercise(profiling)
    assert profiling.close()
    told, kept = list(sink.told), len(inline.spans)
    assert told[-1] == ("close", "")
    assert len(sink.records()) == 6
    assert (profiling.close(), profiling.flush()) == (True, True)
    step = exercise(profiling, 2)
    wait_until(lambda: not any(thread.name == "vgen-Recorder" for thread in threading.enumerate()))
    assert (sink.told, len(inline.spans)) == (told, kept)
    assert step.summary()["tokens"] == 1, "the aggregates go on"
    assert all(profiling.dropped()[name] >= 6 for name in ("Recorder", "MemorySink"))


def test_close_from_many_threads_closes_once(contexts: Make):
    sink = Recorder()
    profiling = contexts(sink)
    exercise(profiling)
    threads = [threading.Thread(target=command) for command in [profiling.close, profiling.flush] * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    wait_until(lambda: sink.told.count(("close", "")) == 1)
    assert len(sink.records()) == 6


def test_a_context_that_nobody_holds_any_more_is_closed():
    sink = Recorder()
    profiling = ProfilingContext([sink])
    exercise(profiling)
    run = weakref.ref(profiling.run)
    del profiling
    gc.collect()
    wait_until(lambda: run() is None and sink.told[-1] == ("close", ""))
    assert len(sink.records()) == 6
    wait_until(lambda: not any(t.name == "vgen-Recorder" for t in threading.enumerate()))


def test_the_worker_may_be_the_last_to_hold_a_context(monkeypatch):
    """It would wait for itself, for the whole deadline."""

    dropped = threading.Event()

    class Late(Recorder):
        def on_start(self, span: Span, attributes: object) -> None:  # type: ignore[override]
            dropped.wait(30)

        def on_idle(self) -> None:
            gc.collect()

    sink = Late()
    monkeypatch.setattr("vgen.profiling.tracer.CLOSE_TIMEOUT", 60.0)
    profiling = ProfilingContext([sink])
    unended = profiling.span("unended")
    copy_context().run(unended.__enter__)  # now its record, which waits, holds the context
    run = weakref.ref(profiling.run)
    del profiling, unended
    gc.collect()
    assert run() is not None
    dropped.set()
    wait_until(lambda: sink.told and sink.told[-1] == ("close", ""), 30.0)


def test_the_identity_sink_hears_of_the_ends_of_its_spans_also_after_close(contexts: Make):
    class Identity(Recorder):
        inline = True

        def identify(self, span: Span) -> bool:
            span.handle = 1
            return False

    sink = Identity()
    profiling = contexts(sink)
    with profiling.span("x"):
        profiling.close()
    assert sink.told[-1] == ("end", "x")


# Sinks that use the context ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False])
def test_what_a_sink_does_is_not_recorded(contexts: Make, memory: MemorySink, inline: bool):
    class Curious(Recorder):
        def _trace(self) -> None:
            with profiling.step(99), profiling.span("own") as span:
                span.set(a=1)
                profiling.record(COUNTER, 1000)
                profiling.rebuilt("rebuilt", 0, 1)
            assert (profiling.current_span(), profiling.carrier()) == (None, {})

        def on_start(self, span: Span, attributes: object) -> None:  # type: ignore[override]
            self._trace()
            super().on_start(span, {})

        def on_end(self, span: Span) -> None:
            self._trace()
            super().on_end(span)

        def on_measurement(self, measurement: object) -> None:  # type: ignore[override]
            self._trace()

        def on_step(self, step: Step) -> None:
            self._trace()

    Curious.inline = inline
    sink = Curious()
    profiling = contexts(sink, memory)
    with profiling.step(1) as step, profiling.span("x") as span:
        assert profiling.current_span() is span
        profiling.record(COUNTER, 1)
        assert profiling.current_span() is span
    assert profiling.flush(5)
    assert [span.name for span in memory.spans] == ["x", "train.step"]
    assert (step.summary()["tokens"], profiling.summary()["tokens"]) == (1, 1)
    assert not profiling.dropped()


@pytest.mark.fault(
    point="a telemetry sink's methods",
    did="A sink closes its own context",
    happens="No deadlock",
    within=20,
)
def test_a_sink_that_flushes_or_closes_its_own_context_does_not_hang(contexts: Make, waits: Any):
    class Eager(Recorder):
        def on_step(self, step: Step) -> None:
            super().on_step(step)
            profiling.flush(5)
            profiling.close(5)

    sink = Eager()
    profiling = contexts(sink)
    exercise(profiling)
    wait_until(lambda: ("close", "") in sink.told)
    assert waits == [], "the worker does not wait for itself"


def test_losses_a_sink_knows_of_count_and_not_what_is_in_its_hands(contexts: Make):
    gate = Gate()

    class Batching(Recorder):
        lost = 0

        def on_end(self, span: Span) -> None:
            self.lost += 1

        def on_idle(self) -> None:
            gate()
            self.lost -= 1

    profiling = contexts(Batching())
    exercise(profiling)
    assert gate.reached.wait(5)
    assert not profiling.dropped()
    gate.open()
    profiling.flush()
    assert profiling.dropped() == {"Batching": 1}
    assert exercise(profiling, 2).summary()[semconv.DROPPED.name] == 1


def test_what_is_lost_after_the_last_step_is_in_the_runs_summary(contexts: Make):
    class Failing(Recorder):
        def on_end(self, span: Span) -> None:
            raise OSError("full")

    profiling = contexts(Failing())
    with profiling.span("after the last step"):
        pass
    profiling.flush()
    profiling.close()
    assert profiling.summary()[semconv.DROPPED.name] == 1
