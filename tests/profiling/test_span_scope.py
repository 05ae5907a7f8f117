"""Context managers and decorators: when a span begins and ends, whatever ends first and wherever."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from helpers.clock import Clock

from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.content_capture import ContentCapture
from vgen.profiling.sinks.memory import MemorySink


def test_of_an_error_the_type_is_recorded_and_never_what_it_says(profiling: ProfilingContext, memory: MemorySink):
    with pytest.raises(ValueError, match="secret"), profiling.span("outer"), profiling.span("inner"):
        raise ValueError("the secret prompt")
    assert [span.error for span in memory.spans] == ["ValueError", "ValueError"]
    told = [(s.name, s.error, s.attributes, s.events, s.links) for s in memory.spans]
    assert "secret" not in repr(told)


@pytest.mark.fault(
    point="values and callbacks in telemetry",
    did="An error's text cannot be made",
    happens="The error itself is raised",
    within=20,
)
def test_an_error_that_cannot_be_printed_is_still_the_one_that_is_raised():
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    sink = MemorySink()
    profiling = ProfilingContext([sink], capture=ContentCapture())
    with pytest.raises(Mute), profiling.span("x"):
        raise Mute
    assert (sink.spans[0].error, sink.spans[0].attributes) == ("Mute", {semconv.EXCEPTION_MESSAGE: "<Mute>"})


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


async def test_a_decorator_of_a_coroutine_function_covers_its_awaits(
    profiling: ProfilingContext, memory: MemorySink, monkeypatch: pytest.MonkeyPatch
):
    clock = Clock(monkeypatch)

    class Callable:
        async def __call__(self) -> None:
            await asyncio.sleep(0)
            clock.advance(0.5)

    @profiling.span("work")
    async def work() -> None:
        await asyncio.sleep(0)
        clock.advance(0.5)

    assert inspect.iscoroutinefunction(work)
    await asyncio.gather(work(), work())
    await profiling.span("object")(Callable())()
    assert [span.parent for span in memory.spans] == [None, None, None]
    assert [span.duration for span in memory.spans] == [0.5, 1.0, 0.5], "the second covers the first's work, too"


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
