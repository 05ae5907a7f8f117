"""The profiling context: the caller passes it to generation classes, and opens its own steps and spans with it."""

from __future__ import annotations

import functools
import inspect
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from typing import Any

from . import semconv
from .aggregation import Row
from .content_capture import ContentCapture
from .measurement import Attributes, Instrument
from .propagation import pack, unpack
from .sink_pipeline import flush_or_close_all, lost_records
from .span_model import Sink, Span
from .span_scope import DisabledScope, F, SpanScope, StepScope, is_async, refuse_generator
from .tracer import CLOSE_TIMEOUT, NO_SPAN, ObservedGauge, Tracer
from .value_conversion import numeric, plain


class ProfilingContext:
    """Opens spans and takes measurements, aggregates them by step, and passes them to the sinks.

    A context is immutable: `bind` returns a copy with more attributes. Copies share the sinks, the open span and the
    aggregates of the run. So a generation object's spans become children of the step that the trainer opened on its
    own copy. Contexts that were constructed separately share nothing.

    Pickling a context gives one without sinks, with the same attributes, whose root spans are children of the span
    that was open. A fork shares the sinks; each child process writes its own files.

    Args:
        sinks: Receive the records. At most one of them may assign span IDs, as `OTelSink` does.
        attributes: On all spans and measurements of this context.
        parent: The `carrier()` of another process. Its open span becomes the parent of this context's root spans.
        capture: Allows prompts, completions and exception messages to be recorded. By default none of them is.

    Example:
        profiling = ProfilingContext([JsonlSink("runs/a")], {"vgen.rank": 0})
        with profiling.step(7) as row:
            with profiling.span("reward") as span:
                span.set(mean=0.3)
        log(row.summary())     # {"reward.duration.sum": 0.0012, ...}
    """

    __slots__ = ("_attributes", "_tracer")

    def __init__(
        self,
        sinks: Iterable[Sink] = (),
        attributes: Attributes | None = None,
        *,
        parent: Mapping[str, str] | None = None,
        capture: ContentCapture | None = None,
    ) -> None:
        self._tracer: Tracer | None = Tracer(tuple(sinks), unpack(parent), capture)
        self._attributes = plain(dict(attributes or {}))

    @classmethod
    def disabled(cls) -> ProfilingContext:
        """Return the context that records nothing. It costs about as much as an empty context manager."""
        return _DISABLED

    @property
    def enabled(self) -> bool:
        """False for the disabled context: then skip what would be computed only to be recorded."""
        return self._tracer is not None

    @property
    def capture(self) -> ContentCapture | None:
        """How content may be recorded; None (the default) if it may not."""
        return self._tracer.capture if self._tracer is not None else None

    def bind(self, attributes: Attributes | None = None, /, **more: Any) -> ProfilingContext:
        """Return a copy whose spans and measurements also have these attributes."""
        if self._tracer is None:
            return self
        return self._copy(self._tracer, {**self._attributes, **plain({**(attributes or {}), **more})})

    def span(self, name: str, attributes: Attributes | None = None, /, **more: Any) -> SpanScope:
        """Open a span: `with` and `async with` yield its `Span`; as a decorator, each call of the function is a span.

        If an exception ends the span, its type is recorded and the exception goes on. Pass attribute names that have
        dots in the dict.
        """
        if self._tracer is None:
            return _DISABLED_SCOPE
        return SpanScope(self._tracer, self._attributes, name, {**attributes, **more} if attributes else more)

    def step(self, number: int, attributes: Attributes | None = None, /, **more: Any) -> StepScope:
        """Open the span of one training step: the root of a new trace, with a link to the step before.

        If a span is already open, the step becomes its child instead. At its end the row closes: `summary()` is
        final and sinks write the row. A value belongs to the innermost step that was open when it was measured; a
        value that arrives after that step's end belongs only to the run. So does one from a thread that knows of no
        step, of which the log warns once while a step is open elsewhere: see `carry`.
        """
        if self._tracer is None:
            return _DISABLED_SCOPE
        step_attributes = {**(attributes or {}), **more, semconv.STEP_NUMBER: int(number)}
        return StepScope(self._tracer, self._attributes, semconv.STEP, step_attributes)

    def record(self, instrument: Instrument, value: float, **attributes: Any) -> None:
        """Record one value of a counter, gauge or histogram."""
        if self._tracer is not None:
            values = (value,) if type(value) is float else numeric(instrument, (value,))
            self._tracer.measure(instrument, values, self._attributes, attributes)

    def record_many(self, instrument: Instrument, values: Iterable[float], **attributes: Any) -> None:
        """Record values that belong together, such as those of a reply's thousand requests, as one record."""
        if self._tracer is not None and (converted := numeric(instrument, values)):
            self._tracer.measure(instrument, converted, self._attributes, attributes)

    def observe(self, instrument: Instrument, callback: Callable[[], float]) -> None:
        """Register a gauge: `callback` returns its value, and bound methods are referenced weakly.

        It is called at the end of each step, and whenever a sink such as `OTelSink` reads it.
        """
        if self._tracer is not None:
            reference = weakref.WeakMethod(callback) if inspect.ismethod(callback) else (lambda: callback)
            self._tracer.observe(ObservedGauge(instrument, reference, self._attributes))

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
        """Record a span afterwards, from `time.monotonic_ns` timings; it is marked with `vgen.rebuilt`.

        It becomes a child of `parent`, by default of the open span.
        """
        attributes = {**(attributes or {}), semconv.REBUILT: True}
        span = self.detached(name, attributes, parent=parent, start_ns=start_ns)
        self.finish(span, error, end_ns=end_ns)
        return span

    def detached(
        self,
        name: str,
        attributes: Attributes | None = None,
        /,
        *,
        parent: Span | None = None,
        start_ns: int | None = None,
    ) -> Span:
        """Open a span for work that runs while the caller does other things. `finish` ends it, on any thread.

        New spans do not become its children. It is a child of `parent`, by default of the open span. Send
        `carrier(span)` with the work. `start_ns` is for work that began earlier.
        """
        if self._tracer is None:
            return NO_SPAN
        start_ns = time.monotonic_ns() if start_ns is None else start_ns
        return self._tracer.detach(self._attributes, name, start_ns, dict(attributes or {}), parent)

    def finish(self, span: Span, error: str | None = None, *, end_ns: int | None = None) -> None:
        """End a `detached` span, now or at `end_ns` (`time.monotonic_ns`). A second call has no effect."""
        if self._tracer is not None and span is not NO_SPAN and span.end_ns is None:
            self._tracer.finish(span, time.monotonic_ns() if end_ns is None else end_ns, error)

    def carry(self, function: F) -> F:
        """Bind `function` to the open span and step, for a thread or an executor: they do not inherit them.

        With `executor.map(profiling.carry(reward), rollouts)`, the spans of each call become children of the open
        span.
        """
        refuse_generator(function)
        context = copy_context()
        if is_async(function):

            @functools.wraps(function)
            async def carried_async(*args: Any, **kwargs: Any) -> Any:
                import asyncio  # not at the top: it takes more than half of the time allowed for `import vgen`

                return await asyncio.create_task(function(*args, **kwargs), context=context.copy())

            return carried_async  # type: ignore[return-value]

        @functools.wraps(function)
        def carried(*args: Any, **kwargs: Any) -> Any:
            # A copy for each call: two threads cannot enter the same context at once.
            return context.copy().run(function, *args, **kwargs)

        return carried  # type: ignore[return-value]

    def carrier(self, span: Span | None = None, *, sampled: bool = True) -> dict[str, str]:
        """Return a W3C `traceparent` for `span`, by default the open span: as HTTP headers, or for another process's
        `parent`.

        The dict is empty if no span is open. `sampled=False` tells the receiver to record nothing below that span.
        """
        if self._tracer is None or span is NO_SPAN:
            return {}
        return pack(self._tracer.current_parent() if span is None else span, sampled)

    def current_span(self) -> Span | None:
        """Return the innermost open span, or None."""
        span = self._tracer.current.get() if self._tracer is not None else None
        return None if span is NO_SPAN else span

    @property
    def run(self) -> Row:
        """The aggregates of the run so far: of ended steps, and of everything outside steps."""
        return self._tracer.run if self._tracer is not None else Row()

    def summary(self) -> dict[str, float]:
        """Return `run` as a flat dict, in the form of `Step.summary`."""
        return self.run.summary()

    def dropped(self) -> dict[str, int]:
        """Return how many records were lost so far, by sink class: a queue was full, or a sink failed."""
        return lost_records(self._tracer.outlets) if self._tracer is not None else {}

    def flush(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Let each sink deliver its records. False if one failed or took longer than `timeout` seconds."""
        return self._tracer is None or flush_or_close_all("flush", self._tracer.outlets, timeout)

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Flush and close all sinks. Runs automatically at interpreter exit; a second call has no effect.

        Returns False if a sink failed or took longer than `timeout` seconds; vgen then abandons the sink and counts
        its records as lost. `os._exit` and SIGKILL skip this and lose the records that wait.
        """
        return self._tracer is None or self._tracer.close(timeout)

    def __enter__(self) -> ProfilingContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __copy__(self) -> ProfilingContext:
        return self

    def __deepcopy__(self, memo: object) -> ProfilingContext:
        return self  # a deep copy of a configuration records to the same sinks as the original

    def __reduce__(self) -> tuple[Any, ...]:
        return ProfilingContext._copy, (self._tracer, self._attributes)

    @classmethod
    def _copy(cls, tracer: Tracer | None, attributes: dict[str, Any]) -> ProfilingContext:
        copy = cls.__new__(cls)
        copy._tracer, copy._attributes = tracer, attributes
        return copy


_DISABLED_SCOPE = DisabledScope()
_DISABLED = ProfilingContext._copy(None, {})  # pyright: ignore[reportPrivateUsage]
