"""The profiling context: what generation classes are given, and what a trainer opens its steps with."""

from __future__ import annotations

import functools
import inspect
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from typing import Any

from . import names
from .carrier import Remote, pack, unpack
from .content import ContentCapture
from .core import CLOSE_TIMEOUT, NO_SPAN, Core, Observed
from .delivery import losses, tell_all
from .records import Attributes, Instrument, Sink, Span, numeric, plain
from .sketch import Row
from .spans import F, NoMaker, SpanMaker, StepMaker, is_async, refuse_generator


class ProfilingContext:
    """Opens spans and takes measurements; aggregates them by step; hands them to the sinks it was given.

    It is immutable: `bind` returns a copy with more attributes. Copies share sinks, the open span and
    the run's aggregates, so what a generation object records nests beneath the step that the trainer
    opened on its own copy. Contexts that were constructed apart share nothing.

    `parent` is another process's `carrier()`: what is opened here with no span of this process around it
    lies beneath that one's open span. Pickled, a context arrives as one without sinks, with the same
    attributes and beneath the span that was open; a fork shares the sinks, each child with files of its own.

    Prompts, completions and what exceptions say are recorded only where `capture` is given.

        profiling = ProfilingContext([JsonlSink("runs/a")], {"vgen.rank": 0})
        with profiling.step(7) as row:
            with profiling.span("reward") as span:
                span.set(mean=0.3)
        log(row.summary())     # {"reward.duration.sum": 0.0012, ...}
    """

    __slots__ = ("_attributes", "_core")

    def __init__(
        self,
        sinks: Iterable[Sink] = (),
        attributes: Attributes | None = None,
        *,
        parent: Mapping[str, str] | None = None,
        capture: ContentCapture | None = None,
    ) -> None:
        self._core: Core | None = Core(tuple(sinks), unpack(parent), capture)
        self._attributes = plain(dict(attributes or {}))

    @classmethod
    def disabled(cls) -> ProfilingContext:
        """The context that does nothing, at about the cost of an empty context manager."""
        return _DISABLED

    @property
    def enabled(self) -> bool:
        """False for the disabled context: skip what is only computed to be recorded."""
        return self._core is not None

    @property
    def capture(self) -> ContentCapture | None:
        """How content may be recorded; None, as it is by default, when it may not."""
        return self._core.capture if self._core is not None else None

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
        fixed, sinks write theirs. A value belongs to the innermost step it is measured in, and one that
        comes after the end to the run alone.
        """
        if self._core is None:
            return _OFF
        own = {**(attributes or {}), **more, names.STEP_NUMBER: int(number)}
        return StepMaker(self._core, self._attributes, names.STEP, own)

    def record(self, instrument: Instrument, value: float, **attributes: Any) -> None:
        """One value of a counter, gauge or histogram."""
        if self._core is not None:
            values = (value,) if type(value) is float else numeric(instrument, (value,))
            self._core.measure(instrument, values, self._attributes, attributes)

    def record_many(self, instrument: Instrument, values: Iterable[float], **attributes: Any) -> None:
        """Values that belong together, in one record: a reply's thousand requests."""
        if self._core is not None and (kept := numeric(instrument, values)):
            self._core.measure(instrument, kept, self._attributes, attributes)

    def observe(self, instrument: Instrument, callback: Callable[[], float]) -> None:
        """Ask `callback` for the gauge's value whenever a step ends. Bound methods are held weakly."""
        if self._core is not None:
            held = weakref.WeakMethod(callback) if inspect.ismethod(callback) else (lambda: callback)
            self._core.observe(Observed(instrument, held, self._attributes))

    def rebuilt(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes | None = None,
        *,
        parent: Span | None = None,
        error: str | None = None,
    ) -> Span:
        """A span made after the fact, from timings of `time.monotonic_ns`'s clock, marked as such.

        It lies beneath `parent`, or beneath the open span.
        """
        if self._core is None:
            return NO_SPAN
        own = {**(attributes or {}), names.REBUILT: True}
        return self._core.rebuild(self._attributes, name, start_ns, end_ns, own, parent, error)

    def detached(
        self,
        name: str,
        attributes: Attributes | None = None,
        /,
        *,
        parent: Span | None = None,
        start_ns: int | None = None,
    ) -> Span:
        """A span that others do not nest under: it begins now, here, and `finish` ends it, on whatever thread.

        For what is in flight while the caller does other things. It lies beneath `parent`, or beneath the
        open span; `carrier(span)` is what travels with the work. `start_ns` is for what is seen late.
        """
        if self._core is None:
            return NO_SPAN
        start_ns = time.monotonic_ns() if start_ns is None else start_ns
        return self._core.detach(self._attributes, name, start_ns, dict(attributes or {}), parent)

    def finish(self, span: Span, error: str | None = None, *, end_ns: int | None = None) -> None:
        """End a `detached` span, now or at `end_ns` of `time.monotonic_ns`'s clock. Twice does no harm."""
        if self._core is not None and span is not NO_SPAN and span.end_ns is None:
            self._core.finish(span, time.monotonic_ns() if end_ns is None else end_ns, error)

    def carry(self, function: F) -> F:
        """`function` bound to the span that is open now, for a thread or an executor, which inherit none by themselves.

        `executor.map(profiling.carry(reward), rollouts)` puts every call's spans beneath the open one.
        """
        refuse_generator(function)
        here = copy_context()
        if is_async(function):

            @functools.wraps(function)
            async def carried_async(*args: Any, **kwargs: Any) -> Any:
                import asyncio  # more than half of `import vgen`'s budget, so not at import

                return await asyncio.create_task(function(*args, **kwargs), context=here.copy())

            return carried_async  # type: ignore[return-value]

        @functools.wraps(function)
        def carried(*args: Any, **kwargs: Any) -> Any:
            # a copy for each call: one context cannot be entered by two threads at once
            return here.copy().run(function, *args, **kwargs)

        return carried  # type: ignore[return-value]

    def carrier(self, span: Span | None = None, *, sampled: bool = True) -> dict[str, str]:
        """`span`, or else the open one, as W3C `traceparent`, for HTTP headers or another process's `parent`.

        Empty outside any. With `sampled=False` the receiver is told to record nothing beneath it.
        """
        if self._core is None or span is NO_SPAN:
            return {}
        here = self._core.here() if span is None else Remote(span.trace_id, span.span_id, span.sampled)
        return pack(here if sampled or here is None else here._replace(sampled=False))

    def current_span(self) -> Span | None:
        """The innermost open span, None outside any."""
        span = self._core.current.get() if self._core is not None else None
        return None if span is NO_SPAN else span

    @property
    def run(self) -> Row:
        """The aggregates of the whole run so far: ended steps, and what lay outside any."""
        return self._core.run if self._core is not None else Row()

    def summary(self) -> dict[str, float]:
        """`run` as a flat dict, like `Step.summary`."""
        return self.run.summary()

    def dropped(self) -> dict[str, int]:
        """Records lost so far, by sink class: refused by a full queue, or taken by a sink that failed."""
        return losses(self._core.outlets) if self._core is not None else {}

    def flush(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Have every sink hand on what it was given. False when one failed or took longer than `timeout` seconds."""
        return self._core is None or tell_all("flush", self._core.outlets, timeout)

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Flush and close every sink. Runs by itself at interpreter exit; twice does no harm.

        False when a sink failed or did not make it within `timeout` seconds: then it is left behind, its
        loss counted. `os._exit` runs nothing of this and loses what waits, as SIGKILL does.
        """
        return self._core is None or self._core.close(timeout)

    def __enter__(self) -> ProfilingContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __copy__(self) -> ProfilingContext:
        return self

    def __deepcopy__(self, memo: object) -> ProfilingContext:
        return self  # a copied configuration is traced like the original

    def __reduce__(self) -> tuple[Any, ...]:
        return ProfilingContext._copy, (self._core, self._attributes)

    @classmethod
    def _copy(cls, core: Core | None, attributes: dict[str, Any]) -> ProfilingContext:
        copy = cls.__new__(cls)
        copy._core, copy._attributes = core, attributes
        return copy


_OFF = NoMaker()
_DISABLED = ProfilingContext._copy(None, {})  # pyright: ignore[reportPrivateUsage]
