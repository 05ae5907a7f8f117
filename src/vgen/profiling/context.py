"""The profiling context: what generation classes are given, and what a trainer opens its steps with."""

from __future__ import annotations

import functools
import inspect
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, copy_context
from types import TracebackType
from typing import Any, TypeVar

from . import names
from .delivery import Outlet, tell_all
from .ids import new_span_id, new_trace_id
from .records import Attributes, IdentitySink, Instrument, Link, Measurement, Sink, Span, Step, plain
from .sketch import Row

F = TypeVar("F", bound="Callable[..., Any]")

CLOSE_TIMEOUT = 2.0
"""Seconds that `flush` and `close` may take by default."""


class ProfilingContext:
    """Opens spans and takes measurements; aggregates them by step; hands them to the sinks it was given.

    It is immutable: `bind` returns a copy with more attributes. Copies share sinks, the open span and
    the run's aggregates, so what a generation object records nests beneath the step that the trainer
    opened on its own copy. Contexts that were constructed apart share nothing.

        profiling = ProfilingContext([JsonlSink("runs/a")], {"vgen.rank": 0})
        with profiling.step(7) as row:
            with profiling.span("reward") as span:
                span.set(mean=0.3)
        log(row.summary())     # {"reward.duration.sum": 0.0012, ...}
    """

    __slots__ = ("_attributes", "_core")

    def __init__(self, sinks: Iterable[Sink] = (), attributes: Attributes | None = None) -> None:
        self._core: _Core | None = _Core(tuple(sinks))
        self._attributes = plain(dict(attributes or {}))

    @classmethod
    def disabled(cls) -> ProfilingContext:
        """The context that does nothing, at about the cost of an empty context manager."""
        return _DISABLED

    @property
    def enabled(self) -> bool:
        """False for the disabled context: skip what is only computed to be recorded."""
        return self._core is not None

    def bind(self, attributes: Attributes | None = None, /, **more: Any) -> ProfilingContext:
        """A copy whose spans and measurements carry these attributes too."""
        if self._core is None:
            return self
        return self._copy(self._core, {**self._attributes, **plain({**(attributes or {}), **more})})

    def span(self, name: str, attributes: Attributes | None = None, /, **more: Any) -> SpanMaker:
        """A span: `with` (or `async with`) yields its `Span`; as a decorator it times every call.

        An exception marks the span with its type and goes on. Names with dots go into the dict.
        """
        if self._core is None:
            return _OFF
        return SpanMaker(self._core, self._attributes, name, {**attributes, **more} if attributes else more)

    def step(self, number: int, attributes: Attributes | None = None, /, **more: Any) -> StepMaker:
        """The span of one training step: the root of a trace, linked to the step before it.

        Where a span is already open, it is that span's child. Its end closes the row: `summary()` is
        fixed, sinks write theirs.
        """
        if self._core is None:
            return _OFF
        own = {names.STEP_NUMBER: number, **(attributes or {}), **more}
        return StepMaker(self._core, self._attributes, names.STEP, own)

    def record(self, instrument: Instrument, value: float, **attributes: Any) -> None:
        """One value of a counter, gauge or histogram."""
        if self._core is not None:
            self._core.measure(instrument, (value,), self._attributes, attributes)

    def record_many(self, instrument: Instrument, values: Iterable[float], **attributes: Any) -> None:
        """Values that belong together, in one record: a reply's thousand requests."""
        if self._core is not None and (kept := tuple(values)):
            self._core.measure(instrument, kept, self._attributes, attributes)

    def observe(self, instrument: Instrument, callback: Callable[[], float]) -> None:
        """Ask `callback` for the gauge's value whenever a step ends. Bound methods are held weakly."""
        if self._core is not None:
            held = weakref.WeakMethod(callback) if inspect.ismethod(callback) else (lambda: callback)
            self._core.observe(instrument, held, self._attributes)

    def rebuilt(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes | None = None,
        *,
        parent: Span | None = None,
        error: str | None = None,
    ) -> None:
        """A span made after the fact, from timings of `time.monotonic_ns`'s clock, marked as such.

        It lies beneath `parent`, or beneath the open span.
        """
        if self._core is not None:
            own = {**(attributes or {}), names.REBUILT: True}
            self._core.rebuild(self._attributes, name, start_ns, end_ns, own, parent, error)

    def carry(self, function: F) -> F:
        """`function` bound to the span that is open now, for a thread or an executor, which inherit none by themselves.

        `executor.map(profiling.carry(reward), rollouts)` puts every call's spans beneath the open one.
        """
        here = copy_context()

        @functools.wraps(function)
        def carried(*args: Any, **kwargs: Any) -> Any:
            # a copy for each call: one context cannot be entered by two threads at once
            return here.copy().run(function, *args, **kwargs)

        return carried  # type: ignore[return-value]

    def current_span(self) -> Span | None:
        """The innermost open span, None outside any."""
        return self._core.current.get() if self._core is not None else None

    def summary(self) -> dict[str, float]:
        """The aggregates of the whole run so far: ended steps, and what lay outside any."""
        return self._core.run.summary() if self._core is not None else {}

    def dropped(self) -> dict[str, int]:
        """Records lost so far, by sink class."""
        outlets = self._core.outlets if self._core is not None else ()
        return {type(o.sink).__name__: o.dropped for o in outlets if o.dropped}

    def flush(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Have every sink hand on what it was given. False when that took longer than `timeout` seconds."""
        return self._core is None or tell_all("flush", self._core.outlets, timeout)

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Flush and close every sink. Runs by itself at interpreter exit; twice does no harm.

        False when a sink did not make it within `timeout` seconds: it is left behind, its loss counted.
        """
        return self._core is None or self._core.close(timeout)

    def __enter__(self) -> ProfilingContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def _copy(cls, core: _Core | None, attributes: dict[str, Any]) -> ProfilingContext:
        copy = cls.__new__(cls)
        copy._core, copy._attributes = core, attributes
        return copy


class _Core:
    """What a context shares with its bound copies."""

    def __init__(self, sinks: tuple[Sink, ...]) -> None:
        identities = [sink for sink in sinks if isinstance(sink, IdentitySink)]
        if len(identities) > 1:
            raise ValueError(
                f"one sink gives out span ids, but {' and '.join(type(s).__name__ for s in identities)} were passed: "
                "give one of them a provider with several processors instead"
            )
        self.outlets = tuple(Outlet(sink) for sink in sinks)
        self.identify = next((o.identify for o in self.outlets if o.identify is not None), None)
        self.on_start = tuple(o.start for o in self.outlets if o.start is not None)
        # Ends in reverse, as nested context managers would.
        self.on_end = tuple(o.end for o in reversed(self.outlets) if o.end is not None)
        self.on_measurement = tuple(o.measure for o in self.outlets if o.measure is not None)
        self.on_step = tuple(o.step for o in self.outlets if o.step is not None)
        self.on_observe = tuple(o.observe for o in self.outlets if o.observe is not None)
        self.current: ContextVar[Span | None] = ContextVar("vgen.current_span", default=None)
        self.run = Row()
        self.last_step: Link | None = None
        self.observers: list[tuple[Instrument, Callable[[], Callable[[], float] | None], dict[str, Any]]] = []
        self._at_exit = weakref.finalize(self, tell_all, "close", self.outlets, CLOSE_TIMEOUT)

    def close(self, timeout: float) -> bool:
        """Close the sinks, once, whether called, at interpreter exit or when nobody holds the context any more."""
        return self._at_exit.detach() is None or tell_all("close", self.outlets, timeout)

    def open(self, span: Span, bound: dict[str, Any], name: str, own: Mapping[str, Any], parent: Span | None) -> None:
        """Fill in a new span and tell the sinks. `start_ns` may already be set."""
        if parent is None:
            inherited = {**bound, **plain(own)} if bound else plain(own)
            span.parent_id, step, span.sampled = None, None, True
            span.offset_ns = time.time_ns() - time.monotonic_ns()
        else:
            inherited = {**parent.inherited, **bound, **plain(own)}
            span.trace_id, span.parent_id, step = parent.trace_id, parent.span_id, parent.step
            span.sampled = parent.sampled
            span.offset_ns = parent.offset_ns
        span.name, span.parent = name, parent
        span.attributes = span.inherited = inherited
        span.events = span.links = ()
        span.end_ns = span.error = span.handle = None
        if isinstance(span, Step):
            span.step = span
            # A run is many traces, one a step, each pointing at the one before: nobody can read an endless one.
            if self.last_step is not None:
                span.links = (self.last_step,)
        else:
            span.step = step
        if self.identify is None or not self.identify(span):
            span.span_id = new_span_id()
            if parent is None:
                span.trace_id = new_trace_id()
        for start in self.on_start:
            start(span, span.attributes)

    def end(self, span: Span, error: str | None) -> None:
        """Close a span whose `end_ns` is set, aggregate its seconds and tell the sinks."""
        span.error = error
        self._row(span).add(span.name + ".duration", (span.end_ns - span.start_ns) / 1e9)  # type: ignore[operator]
        for end in self.on_end:
            end(span)

    def rebuild(
        self,
        bound: dict[str, Any],
        name: str,
        start_ns: int,
        end_ns: int,
        own: dict[str, Any],
        parent: Span | None,
        error: str | None,
    ) -> None:
        span = Span()
        span.maker, span.current, span.start_ns = None, False, start_ns
        self.open(span, bound, name, own, parent or self.current.get())
        span.end_ns = end_ns
        self.end(span, error)

    def measure(
        self, instrument: Instrument, values: tuple[float, ...], bound: dict[str, Any], own: dict[str, Any]
    ) -> None:
        span = self.current.get()
        self._row(span).record(instrument, values)
        if not self.on_measurement:
            return
        inherited = span.inherited if span is not None else {}
        measurement = Measurement(
            instrument,
            values,
            plain({**inherited, **bound, **own}),
            time.time_ns(),
            span.trace_id if span is not None else None,
            span.span_id if span is not None else None,
        )
        for take in self.on_measurement:
            take(measurement)

    def _row(self, span: Span | None) -> Row:
        """Where a value belongs: the step that is open, or the run when none is, or has ended meanwhile."""
        step = span.step if span is not None else None
        return self.run if step is None or step.row.closed else step.row

    def observe(
        self, instrument: Instrument, held: Callable[[], Callable[[], float] | None], bound: dict[str, Any]
    ) -> None:
        self.observers.append((instrument, held, bound))

        def read() -> float | None:
            callback = held()
            return None if callback is None else callback()

        for tell in self.on_observe:
            tell(instrument, read, bound)

    def sample(self) -> None:
        """Read what is observed."""
        for entry in tuple(self.observers):
            instrument, held, bound = entry
            callback = held()
            if callback is None:
                self.observers.remove(entry)
                continue
            self.measure(instrument, (callback(),), bound, {})


class SpanMaker:
    """What `ProfilingContext.span` returns: a context manager and a decorator. Each use opens a span of its own."""

    __slots__ = ("_attributes", "_bound", "_core", "_last", "_name")

    _kind: type[Span] = Span

    def __init__(self, core: _Core, bound: dict[str, Any], name: str, attributes: dict[str, Any]) -> None:
        self._core, self._bound, self._name, self._attributes = core, bound, name, attributes

    def __enter__(self) -> Span:
        core = self._core
        span = self._kind()
        span.maker, span.current = self, True
        parent = core.current.get()
        self._begin(span)
        core.open(span, self._bound, self._name, self._attributes, parent)
        core.current.set(span)
        self._last = span
        return span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        core = self._core
        now = time.monotonic_ns()
        span = core.current.get()
        # Normally the innermost; not so when it was opened in another task's context.
        while span is not None and span.maker is not self:
            span = span.parent
        if span is None:
            span = self._last
        else:
            core.current.set(span.parent)
        if span.end_ns is None:
            self._finish(span, now, None if kind is None else kind.__name__)

    def _begin(self, span: Span) -> None:
        span.start_ns = time.monotonic_ns()

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
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator: a span held open across its yields would cover its caller's "
                "work too; open spans inside it, around the work between two yields"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def timed_async(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return timed_async  # type: ignore[return-value]

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return timed  # type: ignore[return-value]


class StepMaker(SpanMaker):
    """What `ProfilingContext.step` returns."""

    __slots__ = ()

    _kind = Step

    def __enter__(self) -> Step:
        return super().__enter__()  # type: ignore[return-value]

    async def __aenter__(self) -> Step:
        return self.__enter__()

    def _begin(self, span: Span) -> None:
        assert isinstance(span, Step)
        span.number, span.row = self._attributes[names.STEP_NUMBER], Row()
        super()._begin(span)

    def _finish(self, span: Span, now: int, error: str | None) -> None:
        core = self._core
        assert isinstance(span, Step)
        # once more the current span: what is observed, and what its callbacks record, belongs to this step
        after = core.current.get()
        core.current.set(span)
        core.sample()
        core.current.set(after)
        span.end_ns = now
        core.end(span, error)
        span.row.close()
        core.run.merge(span.row)
        core.last_step = Link(span.trace_id, span.span_id)
        for write in core.on_step:
            write(span)


class _NoSpan(Step):
    """What the disabled context hands out: takes everything, keeps nothing."""

    __slots__ = ()

    def set(self, attributes: Attributes | None = None, /, **more: Any) -> Span:
        return self

    def event(self, name: str, attributes: Attributes | None = None, /, **more: Any) -> Span:
        return self

    def link(self, other: Span | Link, **attributes: Any) -> Span:
        return self

    def summary(self) -> dict[str, float]:
        return {}


class _NoMaker(StepMaker):
    """`span` and `step` of the disabled context."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def __enter__(self) -> Step:
        return _NO_SPAN

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, function: F) -> F:
        return function


_NO_SPAN = _NoSpan()
_NO_SPAN.name, _NO_SPAN.trace_id, _NO_SPAN.span_id = "", "0" * 32, "0" * 16
_NO_SPAN.parent_id = _NO_SPAN.parent = _NO_SPAN.step = _NO_SPAN.error = _NO_SPAN.maker = None
_NO_SPAN.handle, _NO_SPAN.sampled = None, False
_NO_SPAN.number = _NO_SPAN.start_ns = _NO_SPAN.end_ns = _NO_SPAN.offset_ns = 0
_NO_SPAN.attributes, _NO_SPAN.inherited, _NO_SPAN.current = {}, {}, False
_NO_SPAN.events = _NO_SPAN.links = ()
_NO_SPAN.row = Row()
_OFF = _NoMaker()
_DISABLED = ProfilingContext._copy(None, {})  # pyright: ignore[reportPrivateUsage]
