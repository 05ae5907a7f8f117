"""What a profiling context shares with its bound copies: the open span, the sinks, the aggregates of the run."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from . import semconv
from .aggregation import Row, load_ddsketch
from .content_capture import ContentCapture
from .ids import new_span_id, new_trace_id
from .measurement import Attributes, Instrument, Measurement
from .propagation import RemoteSpan
from .sink_pipeline import SinkOutlet, flush_or_close_all
from .span_model import IdentitySink, Link, Sink, Span, Step
from .value_conversion import numeric, plain

logger = logging.getLogger("vgen.telemetry")

_STEP_MISSING = (
    "vgen: %s was measured without a step, while step %d is open on another thread or task. It counts for the run, and "
    "is not in that step's summary(). Threads and executors do not inherit the open step: let them call "
    "profiling.carry(function). This is said once."
)

CLOSE_TIMEOUT = 2.0
"""Seconds that `flush` and `close` may take by default."""


class _NoSpan(Step):
    """Accepts everything and records nothing."""

    __slots__ = ()

    def set(self, attributes: Attributes | None = None, /, **more: Any) -> Span:
        return self

    def event(self, name: str, attributes: Attributes | None = None, /, **more: Any) -> Span:
        return self

    def link(self, other: Span | Link, **attributes: Any) -> Span:
        return self


NO_SPAN = _NoSpan()
"""The span of the disabled context. It is also the current span while a sink is called, so that nothing is recorded
then."""
NO_SPAN.name, NO_SPAN.trace_id, NO_SPAN.span_id = "", "0" * 32, "0" * 16
NO_SPAN.parent_id = NO_SPAN.parent = NO_SPAN.step = NO_SPAN.error = NO_SPAN.scope = NO_SPAN.handle = None
NO_SPAN.number = NO_SPAN.start_ns = NO_SPAN.end_ns = NO_SPAN.offset_ns = 0
NO_SPAN.attributes, NO_SPAN.inherited, NO_SPAN.current, NO_SPAN.sampled = {}, {}, False, False
NO_SPAN.events = NO_SPAN.links = ()
NO_SPAN.row = Row()


class Tracer:
    """Opens and ends spans, takes measurements, and passes both to the sinks.

    `remote` is the parent of the root spans of this process; None if they start new traces.

    Raises:
        ValueError: More than one of the sinks assigns span IDs.
    """

    def __init__(
        self, sinks: Sequence[Sink], remote: RemoteSpan | None = None, capture: ContentCapture | None = None
    ) -> None:
        identity_sinks = [type(sink).__name__ for sink in sinks if isinstance(sink, IdentitySink)]
        if len(identity_sinks) > 1:
            raise ValueError(
                f"only one sink may assign span IDs, but {' and '.join(identity_sinks)} were passed: "
                "give one of them a provider with several processors instead"
            )
        self.remote, self.capture = remote, capture
        self.current: ContextVar[Span | None] = ContextVar("vgen.current_span", default=None)
        self.outlets = tuple(SinkOutlet(sink, functools.partial(self.current.set, NO_SPAN)) for sink in sinks)
        self.identify: Callable[[Span], bool] | None = next(iter(self._callbacks("identify")), None)
        self.on_start = self._callbacks("on_start")
        self.on_end = self._callbacks("on_end")[::-1]  # in reverse, as nested context managers end
        self.on_measurement = self._callbacks("on_measurement")
        self.on_step = self._callbacks("on_step")
        self.on_observe = self._callbacks("on_observe")
        self.guarded = any(outlet.inline and not getattr(outlet.sink, "quiet", False) for outlet in self.outlets)
        """Whether `current` is `NO_SPAN` while sinks are called: an inline sink may record through this tracer."""
        load_ddsketch()
        self.run: Row = Row()
        self.stepless: Row | _StepMissing = self.run
        """Takes what is measured without a step."""
        self.open_steps: set[Step] = set()
        self.step_missing_said = threading.Lock()
        """Taken for good by the thread that says it."""
        self.last_step: Link | None = None
        self.observed_gauges: list[ObservedGauge] = []
        self._at_exit = weakref.finalize(self, flush_or_close_all, "close", self.outlets, CLOSE_TIMEOUT)
        if self.outlets:
            os.register_at_fork(after_in_child=functools.partial(_after_fork, weakref.ref(self)))

    def _callbacks(self, method: str) -> tuple[Callable[..., Any], ...]:
        """The sinks' methods of that name, without those that no sink overrides."""
        return tuple(callback for o in self.outlets if (callback := o.callback(method)) is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sinks are not pickled. Another process gets the aggregation, and the span that is open here as parent."""
        return Tracer, ((), self.current_parent())

    def current_parent(self) -> RemoteSpan | None:
        """The span that is the parent of spans that another process opens now."""
        span = self.current.get()
        return self.remote if span is None or span is NO_SPAN else RemoteSpan(span.trace_id, span.span_id, span.sampled)

    def close(self, timeout: float) -> bool:
        """Close the sinks, once: when called, at interpreter exit, or when nothing refers to the tracer any more."""
        if not self._at_exit.alive:
            return True
        self.measure_losses(None)
        return self._at_exit.detach() is None or flush_or_close_all("close", self.outlets, timeout)

    def open(
        self, span: Span, parent: Span | None, bound: dict[str, Any], name: str, attributes: dict[str, Any]
    ) -> None:
        """Fill in a span that has `start_ns`, `step`, `links`, `scope` and `current`, and call the sinks.

        If `guarded`, this leaves `NO_SPAN` as the current span: the caller sets the right one.
        """
        attributes = plain(attributes)
        if parent is not None:
            attributes = {**parent.inherited, **bound, **attributes}
            span.trace_id, span.parent_id = parent.trace_id, parent.span_id
            span.sampled, span.offset_ns = parent.sampled, parent.offset_ns
        else:
            if bound:
                attributes = {**bound, **attributes}
            if self.remote is None:
                span.parent_id, span.sampled = None, True
            else:
                span.trace_id, span.parent_id, span.sampled = self.remote
            span.offset_ns = time.time_ns() - time.monotonic_ns()
        span.name, span.parent = name, parent
        span.attributes = span.inherited = attributes
        span.events = ()
        span.end_ns = span.error = span.handle = None
        if self.guarded:
            self.current.set(NO_SPAN)
        if self.identify is None or not self.identify(span):
            span.span_id = new_span_id()
            if parent is None and self.remote is None:
                span.trace_id = new_trace_id()
        for on_start in self.on_start:
            on_start(span, attributes)

    def end(self, span: Span, error: str | None) -> None:
        """Close a span whose `end_ns` is set, aggregate its seconds and call the sinks.

        If `guarded`, this leaves `NO_SPAN` as the current span: the caller sets the right one.
        """
        span.error = error
        step = span.step
        if span.current or span.name not in semconv.SELECTED:
            (self.stepless if step is None else step.row).add(span.name, (span.end_ns - span.start_ns) / 1e9)  # type: ignore[operator]
        if self.guarded:
            self.current.set(NO_SPAN)
        for on_end in self.on_end:
            on_end(span)

    def begin_step(self, step: Step) -> None:
        """Note that a step is open: work on other threads and tasks that knows of none may have lost it."""
        self.open_steps.add(step)
        if not self.step_missing_said.locked():
            self.stepless = _StepMissing(self)

    def forget_step(self, step: Step) -> None:
        """Note that a step is not open any more."""
        self.open_steps.discard(step)
        if not self.open_steps:
            self.stepless = self.run

    def end_step(self, step: Step) -> None:
        """Close the row of a step that has ended, and call the sinks. Changes the current span as `end` does."""
        step.row.close()
        self.run.merge(step.row)
        self.last_step = Link(step.trace_id, step.span_id)
        for on_step in self.on_step:
            on_step(step)

    def detach(
        self, bound: dict[str, Any], name: str, start_ns: int, attributes: dict[str, Any], parent: Span | None
    ) -> Span:
        """Open a span that does not become the parent of new spans. `finish` ends it."""
        current = self.current.get()
        if current is NO_SPAN:
            return NO_SPAN
        span, parent = Span(), parent or current
        span.scope, span.current, span.start_ns, span.links = None, False, start_ns, ()
        span.step = None if parent is None else parent.step
        try:
            self.open(span, parent, bound, name, attributes)
        finally:
            if self.guarded:
                self.current.set(current)
        return span

    def finish(self, span: Span, end_ns: int, error: str | None) -> None:
        """End a detached span."""
        current = self.current.get()
        span.end_ns = end_ns
        try:
            self.end(span, error)
        finally:
            if self.guarded:
                self.current.set(current)

    def measure(
        self,
        instrument: Instrument,
        values: Sequence[float],
        bound: dict[str, Any],
        attributes: dict[str, Any],
        span: Span | None = None,
    ) -> None:
        """Record values that were measured within `span`; by default, within the current span."""
        current = self.current.get()
        if current is NO_SPAN:
            return
        span = span or current
        step = None if span is None else span.step
        (self.stepless if step is None else step.row).record(instrument, values)
        if not self.on_measurement:
            return
        attributes = plain(attributes)
        measurement = Measurement(
            instrument,
            values,
            {**bound, **attributes} if span is None else {**span.inherited, **bound, **attributes},
            time.time_ns(),
            None if span is None else span.trace_id,
            None if span is None else span.span_id,
        )
        try:
            if self.guarded:
                self.current.set(NO_SPAN)
            for on_measurement in self.on_measurement:
                on_measurement(measurement)
        finally:
            if self.guarded:
                self.current.set(current)

    def observe(self, gauge: ObservedGauge) -> None:
        """Read `gauge` at the end of each step from now on."""
        self.observed_gauges.append(gauge)
        for on_observe in self.on_observe:
            on_observe(gauge.instrument, gauge, gauge.bound)

    def read_gauges(self, step: Step) -> None:
        """Read all observed gauges into the row of `step`, and the records that were lost since the last time."""
        for gauge in tuple(self.observed_gauges):
            try:
                value = gauge()
            except Exception as error:
                if not gauge.failed:
                    gauge.failed = True
                    name, kind = gauge.instrument.name, type(error).__name__
                    logger.warning("vgen: the callback that observes %s failed (%s): values are missing", name, kind)
                continue
            if value is not None:
                self.measure(gauge.instrument, (value,), gauge.bound, {}, step)
            else:
                with contextlib.suppress(ValueError):  # a step that ended on another thread has removed it
                    self.observed_gauges.remove(gauge)
        self.measure_losses(step)

    def measure_losses(self, span: Span | None) -> None:
        """Record how many records each sink has lost since the last time."""
        for outlet in self.outlets:
            if lost := outlet.newly_lost():
                self.measure(semconv.DROPPED, (lost,), {}, {semconv.SINK: outlet.name}, span)

    def after_fork(self) -> None:
        """In a forked child: waiting records, open spans and aggregates belong to the parent process.

        The parent's open spans still become the parents of new spans here.
        """
        for outlet in self.outlets:
            outlet.after_fork()
        self.run = self.stepless = Row()
        self.open_steps.clear()
        span, now = self.current.get(), time.monotonic_ns()
        while span is not None:
            if span.end_ns is None:
                span.end_ns = now
            if span.step is not None:
                span.step.row = self.run
            span = span.parent
        # Children of `multiprocessing` end by `os._exit`, after `multiprocessing`'s own finalizers: register one. But
        # not here: it deletes all finalizers that exist before its own fork hooks run. Only if the module is already
        # imported: an import that another thread began before the fork would block forever.
        multiprocessing: Any = sys.modules.get("multiprocessing.util")
        if hasattr(multiprocessing, "register_after_fork"):
            multiprocessing.register_after_fork(self, _close_with_process)


class _StepMissing:
    """In the place of the run's row while a step is open: says once that a value came without one.

    So nothing is asked where values are measured, which is where time is short.
    """

    __slots__ = ("_tracer",)

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def add(self, span_name: str, seconds: float) -> None:
        self._say(span_name)
        self._tracer.run.add(span_name, seconds)

    def record(self, instrument: Instrument, values: Sequence[float]) -> None:
        self._say(instrument.name)
        self._tracer.run.record(instrument, values)

    def _say(self, name: str) -> None:
        tracer = self._tracer
        current, steps = tracer.current.get(), tuple(tracer.open_steps)
        # A span that was opened before the step of its own thread has no step either, and has lost none.
        if name in semconv.STEPLESS or not steps or (current is not None and current.step is not None):
            return
        if tracer.step_missing_said.acquire(blocking=False):
            tracer.stepless = tracer.run
            logger.warning(_STEP_MISSING, name, min(step.number for step in steps))


class ObservedGauge:
    """A gauge and its callback. Calling it returns the value, or None if the observed object no longer exists."""

    def __init__(
        self, instrument: Instrument, reference: Callable[[], Callable[[], float] | None], bound: dict[str, Any]
    ) -> None:
        self.instrument, self.bound, self.failed = instrument, bound, False
        self._reference = reference

    def __call__(self) -> float | None:
        callback = self._reference()
        return None if callback is None else numeric(self.instrument, (callback(),))[0]


def _after_fork(reference: weakref.ref[Tracer]) -> None:
    tracer = reference()
    if tracer is not None:
        tracer.after_fork()


def _close_with_process(tracer: Tracer) -> None:
    from multiprocessing import util

    util.Finalize(tracer, flush_or_close_all, ("close", tracer.outlets, CLOSE_TIMEOUT), exitpriority=0)
