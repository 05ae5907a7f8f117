"""The context managers and decorators that open spans and steps."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from . import names
from .core import NO_SPAN, Core
from .records import Span, Step, as_text
from .sketch import Row

F = TypeVar("F", bound="Callable[..., Any]")


class SpanMaker:
    """What `ProfilingContext.span` returns: a context manager and a decorator. Each use opens a span of its own."""

    __slots__ = ("_attributes", "_bound", "_core", "_last", "_name")

    def __init__(self, core: Core, bound: dict[str, Any], name: str, attributes: dict[str, Any]) -> None:
        self._core, self._bound, self._name, self._attributes = core, bound, name, attributes

    def __enter__(self) -> Span:
        core = self._core
        parent = core.current.get()
        if parent is NO_SPAN:
            return NO_SPAN
        span = Span()
        span.step, span.links = None if parent is None else parent.step, ()
        return self._enter(core, span, parent)

    def _enter(self, core: Core, span: Span, parent: Span | None) -> Span:
        span.maker, span.current, span.start_ns = self, True, time.monotonic_ns()
        try:
            core.open(span, parent, self._bound, self._name, self._attributes)
        except BaseException:
            core.current.set(parent)
            raise
        core.current.set(span)
        self._last = span
        return span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        core = self._core
        now = time.monotonic_ns()
        after = span = core.current.get()
        # Normally the innermost; not so when it was opened in another task's context.
        while span is not None and span.maker is not self:
            span = span.parent
        if span is not None:
            after = span.parent
        elif after is NO_SPAN:
            return
        else:
            span = self._last
        try:
            if span.end_ns is None:
                if error is not None and core.capture is not None:
                    span.set({names.EXCEPTION_MESSAGE: core.capture.text(as_text(error))})
                self._finish(span, now, None if kind is None else kind.__name__)
        finally:
            core.current.set(after)
            span.maker = None  # who keeps a span does not keep the context alive

    def _finish(self, span: Span, now: int, error: str | None) -> None:
        span.end_ns = now
        self._core.end(span, error)

    async def __aenter__(self) -> Span:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def __call__(self, function: F) -> F:
        refuse_generator(function)
        make = functools.partial(type(self), self._core, self._bound, self._name, self._attributes)
        if is_async(function):

            @functools.wraps(function)
            async def timed_async(*args: Any, **kwargs: Any) -> Any:
                with make():
                    return await function(*args, **kwargs)

            return timed_async  # type: ignore[return-value]

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with make():
                return function(*args, **kwargs)

        return timed  # type: ignore[return-value]


class StepMaker(SpanMaker):
    """What `ProfilingContext.step` returns."""

    __slots__ = ()

    def __enter__(self) -> Step:
        core = self._core
        parent = core.current.get()
        if parent is NO_SPAN:
            return NO_SPAN
        step = Step()
        step.number, step.row, step.step = self._attributes[names.STEP_NUMBER], Row(core.run), step
        # A run is many traces, one a step, each pointing at the one before: nobody can read an endless one.
        step.links = () if core.last_step is None else (core.last_step,)
        return self._enter(core, step, parent)  # type: ignore[return-value]

    async def __aenter__(self) -> Step:
        return self.__enter__()

    def _finish(self, span: Span, now: int, error: str | None) -> None:
        assert isinstance(span, Step)
        self._core.sample(span)
        super()._finish(span, now, error)
        self._core.end_step(span)


class NoMaker(StepMaker):
    """`span` and `step` of the disabled context."""

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
    """Whether calling it gives a coroutine, also where it is an object with an `async def __call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def refuse_generator(function: Callable[..., Any]) -> None:
    """`TypeError` for a generator function."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{function.__qualname__} is a generator: a span held open across its yields would cover its caller's "
            "work too; open spans inside it, around the work between two yields"
        )
