"""The context managers and decorators that open spans and steps."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any, TypeVar

from . import semconv
from .aggregation import Row
from .span_model import Span, Step
from .tracer import NO_SPAN, Tracer
from .value_conversion import as_text

F = TypeVar("F", bound="Callable[..., Any]")


class SpanScope:
    """What `ProfilingContext.span` returns: a context manager and a decorator. Each use opens a new span."""

    __slots__ = ("_attributes", "_bound", "_last", "_name", "_tracer")

    def __init__(self, tracer: Tracer, bound: dict[str, Any], name: str, attributes: dict[str, Any]) -> None:
        self._tracer, self._bound, self._name, self._attributes = tracer, bound, name, attributes

    def __enter__(self) -> Span:
        tracer = self._tracer
        parent = tracer.current.get()
        if parent is NO_SPAN:
            return NO_SPAN
        span = Span()
        span.step, span.links = None if parent is None else parent.step, ()
        return self._open(tracer, span, parent)

    def _open(self, tracer: Tracer, span: Span, parent: Span | None) -> Span:
        span.scope, span.current, span.start_ns = self, True, time.monotonic_ns()
        try:
            tracer.open(span, parent, self._bound, self._name, self._attributes)
        except BaseException:
            tracer.current.set(parent)
            raise
        tracer.current.set(span)
        self._last = span
        return span

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        tracer = self._tracer
        now = time.monotonic_ns()
        current_after = span = tracer.current.get()
        # The current span is normally the one to end. It is not if the scope was entered in the context of another
        # task, or if a span that was opened later is still open.
        while span is not None and span.scope is not self:
            span = span.parent
        if span is not None:
            current_after = span.parent
        elif current_after is NO_SPAN:
            return
        else:
            span = self._last
        try:
            if span.end_ns is None:
                if error is not None and tracer.capture is not None:
                    span.set({semconv.EXCEPTION_MESSAGE: tracer.capture.text(as_text(error))})
                self._finish(span, now, None if kind is None else kind.__name__)
        finally:
            tracer.current.set(current_after)
            span.scope = None  # a caller that keeps the span then does not keep the context alive

    def _finish(self, span: Span, now: int, error: str | None) -> None:
        span.end_ns = now
        self._tracer.end(span, error)

    async def __aenter__(self) -> Span:
        return self.__enter__()

    async def __aexit__(self, *exception: Any) -> None:
        self.__exit__(*exception)

    def __call__(self, function: F) -> F:
        refuse_generator(function)
        scope = functools.partial(type(self), self._tracer, self._bound, self._name, self._attributes)
        if is_async(function):

            @functools.wraps(function)
            async def traced_async(*args: Any, **kwargs: Any) -> Any:
                with scope():
                    return await function(*args, **kwargs)

            return traced_async  # type: ignore[return-value]

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with scope():
                return function(*args, **kwargs)

        return traced  # type: ignore[return-value]


class StepScope(SpanScope):
    """What `ProfilingContext.step` returns."""

    __slots__ = ()

    def __enter__(self) -> Step:
        tracer = self._tracer
        parent = tracer.current.get()
        if parent is NO_SPAN:
            return NO_SPAN
        step = Step()
        step.number, step.row, step.step = self._attributes[semconv.STEP_NUMBER], Row(tracer.run), step
        # Each step is a trace, linked to the step before: no viewer can show one trace of a whole run.
        step.links = () if tracer.last_step is None else (tracer.last_step,)
        self._open(tracer, step, parent)
        tracer.begin_step(step)
        return step

    async def __aenter__(self) -> Step:
        return self.__enter__()

    def _finish(self, span: Span, now: int, error: str | None) -> None:
        assert isinstance(span, Step)
        self._tracer.forget_step(span)
        self._tracer.read_gauges(span)
        super()._finish(span, now, error)
        self._tracer.end_step(span)


class DisabledScope(StepScope):
    """What `span` and `step` of the disabled context return."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def __enter__(self) -> Step:
        return NO_SPAN

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, function: F) -> F:
        refuse_generator(function)
        return function


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a call returns a coroutine. `function` may also be an object with an `async def __call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def refuse_generator(function: Callable[..., Any]) -> None:
    """Raise `TypeError` for a generator function."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{function.__qualname__} is a generator: a span that is open across its yields would also include the "
            "caller's work; open spans inside the generator instead, around the work between two yields"
        )
