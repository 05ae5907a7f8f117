"""What a profiling context shares with its bound copies: the open span, the sinks, the run's aggregates."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from . import names
from .carrier import Remote
from .content import ContentCapture
from .delivery import Outlet, tell_all
from .ids import new_span_id, new_trace_id
from .records import Attributes, IdentitySink, Instrument, Link, Measurement, Sink, Span, Step, numeric, plain
from .sketch import Row, load

logger = logging.getLogger("vgen.telemetry")

CLOSE_TIMEOUT = 2.0
"""Seconds that `flush` and `close` may take by default."""


class _NoSpan(Step):
    """Takes everything, keeps nothing."""

    __slots__ = ()

    def set(self, attributes: Attributes | None = None, /, **more: Any) -> Span:
        return self

    def event(self, name: str, attributes: Attributes | None = None, /, **more: Any) -> Span:
        return self

    def link(self, other: Span | Link, **attributes: Any) -> Span:
        return self

    def summary(self) -> dict[str, float]:
        return {}


NO_SPAN = _NoSpan()
"""What the disabled context hands out; and what is open while a sink is called, so that nothing is recorded then."""
NO_SPAN.name, NO_SPAN.trace_id, NO_SPAN.span_id = "", "0" * 32, "0" * 16
NO_SPAN.parent_id = NO_SPAN.parent = NO_SPAN.step = NO_SPAN.error = NO_SPAN.maker = NO_SPAN.handle = None
NO_SPAN.number = NO_SPAN.start_ns = NO_SPAN.end_ns = NO_SPAN.offset_ns = 0
NO_SPAN.attributes, NO_SPAN.inherited, NO_SPAN.current, NO_SPAN.sampled = {}, {}, False, False
NO_SPAN.events = NO_SPAN.links = ()
NO_SPAN.row = Row()


class Core:
    """Opens and ends spans, takes measurements, tells the sinks. `remote` is what roots of this process lie beneath."""

    def __init__(
        self, sinks: Sequence[Sink], remote: Remote | None = None, capture: ContentCapture | None = None
    ) -> None:
        identities = [sink for sink in sinks if isinstance(sink, IdentitySink)]
        if len(identities) > 1:
            raise ValueError(
                f"one sink gives out span ids, but {' and '.join(type(s).__name__ for s in identities)} were passed: "
                "give one of them a provider with several processors instead"
            )
        self.remote, self.capture = remote, capture
        self.current: ContextVar[Span | None] = ContextVar("vgen.current_span", default=None)
        self.outlets = tuple(Outlet(sink, functools.partial(self.current.set, NO_SPAN)) for sink in sinks)
        self.identify = next((o.identify for o in self.outlets if o.identify is not None), None)
        self.on_start = tuple(o.start for o in self.outlets if o.start is not None)
        # Ends in reverse, as nested context managers would.
        self.on_end = tuple(o.end for o in reversed(self.outlets) if o.end is not None)
        self.on_measurement = tuple(o.measure for o in self.outlets if o.measure is not None)
        self.on_step = tuple(o.step for o in self.outlets if o.step is not None)
        self.on_observe = tuple(o.observe for o in self.outlets if o.observe is not None)
        self.inline = any(outlet.inline and not getattr(outlet.sink, "quiet", False) for outlet in self.outlets)
        load()
        self.run = Row()
        self.last_step: Link | None = None
        self.observed: list[Observed] = []
        self._at_exit = weakref.finalize(self, tell_all, "close", self.outlets, CLOSE_TIMEOUT)
        if self.outlets:
            os.register_at_fork(after_in_child=functools.partial(_after_fork, weakref.ref(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Sinks stay behind: another process gets the aggregation, and the span that is open here as its parent."""
        return Core, ((), self.here())

    def here(self) -> Remote | None:
        """What spans of another process are to lie beneath."""
        span = self.current.get()
        return self.remote if span is None or span is NO_SPAN else Remote(span.trace_id, span.span_id, span.sampled)

    def close(self, timeout: float) -> bool:
        """Close the sinks, once, whether called, at interpreter exit or when nobody holds the context any more."""
        if not self._at_exit.alive:
            return True
        self.count_losses(None)
        return self._at_exit.detach() is None or tell_all("close", self.outlets, timeout)

    def open(self, span: Span, parent: Span | None, bound: dict[str, Any], name: str, own: dict[str, Any]) -> None:
        """Fill in a span that has `start_ns`, `step`, `links`, `maker` and `current`, and tell the sinks.

        Leaves `self.current` changed where there are inline sinks that are not quiet: the caller sets it.
        """
        own = plain(own)
        if parent is not None:
            own = {**parent.inherited, **bound, **own}
            span.trace_id, span.parent_id = parent.trace_id, parent.span_id
            span.sampled, span.offset_ns = parent.sampled, parent.offset_ns
        else:
            if bound:
                own = {**bound, **own}
            if self.remote is None:
                span.parent_id, span.sampled = None, True
            else:
                span.trace_id, span.parent_id, span.sampled = self.remote
            span.offset_ns = time.time_ns() - time.monotonic_ns()
        span.name, span.parent = name, parent
        span.attributes = span.inherited = own
        span.events = ()
        span.end_ns = span.error = span.handle = None
        if self.inline:
            self.current.set(NO_SPAN)
        if self.identify is None or not self.identify(span):
            span.span_id = new_span_id()
            if parent is None and self.remote is None:
                span.trace_id = new_trace_id()
        for start in self.on_start:
            start(span, own)

    def end(self, span: Span, error: str | None) -> None:
        """Close a span whose `end_ns` is set, aggregate its seconds and tell the sinks.

        Leaves `self.current` changed where there are inline sinks that are not quiet: the caller sets it.
        """
        span.error = error
        step = span.step
        if span.current or span.name not in names.SELECTED:
            (self.run if step is None else step.row).add(span.name, (span.end_ns - span.start_ns) / 1e9)  # type: ignore[operator]
        if self.inline:
            self.current.set(NO_SPAN)
        for end in self.on_end:
            end(span)

    def end_step(self, step: Step) -> None:
        """Fix the row of a step that has ended, and tell the sinks. Leaves `self.current` changed as `end` does."""
        step.row.close()
        self.run.merge(step.row)
        self.last_step = Link(step.trace_id, step.span_id)
        for write in self.on_step:
            write(step)

    def rebuild(
        self,
        bound: dict[str, Any],
        name: str,
        start_ns: int,
        end_ns: int,
        own: dict[str, Any],
        parent: Span | None,
        error: str | None,
    ) -> Span:
        """Record a span after the fact."""
        span = self.detach(bound, name, start_ns, own, parent)
        if span is not NO_SPAN:
            self.finish(span, end_ns, error)
        return span

    def detach(self, bound: dict[str, Any], name: str, start_ns: int, own: dict[str, Any], parent: Span | None) -> Span:
        """Open a span that is not what others nest under; `finish` ends it."""
        here = self.current.get()
        if here is NO_SPAN:
            return NO_SPAN
        span, parent = Span(), parent or here
        span.maker, span.current, span.start_ns, span.links = None, False, start_ns, ()
        span.step = None if parent is None else parent.step
        try:
            self.open(span, parent, bound, name, own)
        finally:
            if self.inline:
                self.current.set(here)
        return span

    def finish(self, span: Span, end_ns: int, error: str | None) -> None:
        """End a detached span."""
        here = self.current.get()
        span.end_ns = end_ns
        try:
            self.end(span, error)
        finally:
            if self.inline:
                self.current.set(here)

    def measure(
        self,
        instrument: Instrument,
        values: Sequence[float],
        bound: dict[str, Any],
        own: dict[str, Any],
        span: Span | None = None,
    ) -> None:
        """Take values that were measured within `span`, or else within the span that is open."""
        here = self.current.get()
        if here is NO_SPAN:
            return
        span = span or here
        step = None if span is None else span.step
        (self.run if step is None else step.row).record(instrument, values)
        if not self.on_measurement:
            return
        own = plain(own)
        measurement = Measurement(
            instrument,
            values,
            {**bound, **own} if span is None else {**span.inherited, **bound, **own},
            time.time_ns(),
            None if span is None else span.trace_id,
            None if span is None else span.span_id,
        )
        try:
            if self.inline:
                self.current.set(NO_SPAN)
            for take in self.on_measurement:
                take(measurement)
        finally:
            if self.inline:
                self.current.set(here)

    def observe(self, observed: Observed) -> None:
        """Remember what is to be read at the ends of steps."""
        self.observed.append(observed)
        for tell in self.on_observe:
            tell(observed.instrument, observed, observed.bound)

    def sample(self, span: Span) -> None:
        """Read what is observed, into the step that `span` is, and what was lost since the last time."""
        for observed in tuple(self.observed):
            try:
                value = observed()
            except Exception as error:
                if not observed.failed:
                    observed.failed = True
                    name, kind = observed.instrument.name, type(error).__name__
                    logger.warning("vgen: the callback that observes %s failed (%s): values are missing", name, kind)
                continue
            if value is not None:
                self.measure(observed.instrument, (value,), observed.bound, {}, span)
            else:
                with contextlib.suppress(ValueError):  # a step that ends on another thread was quicker
                    self.observed.remove(observed)
        self.count_losses(span)

    def count_losses(self, span: Span | None) -> None:
        """Make the records lost since the last time a measurement, of each sink that lost any."""
        for outlet in self.outlets:
            if lost := outlet.newly_lost():
                self.measure(names.DROPPED, (lost,), {}, {names.SINK: outlet.name}, span)

    def after_fork(self) -> None:
        """In a forked child: records that wait, open spans and aggregates are the parent's.

        New spans lie beneath the parent's open ones all the same.
        """
        for outlet in self.outlets:
            outlet.after_fork()
        self.run = Row()
        span, now = self.current.get(), time.monotonic_ns()
        while span is not None:
            if span.end_ns is None:
                span.end_ns = now
            if span.step is not None:
                span.step.row = self.run
            span = span.parent
        # Children of `multiprocessing` end by `os._exit`, after finalizers of its own; it drops those that were made
        # before its own hooks for a fork have run. Not imported here: an import begun elsewhere would never end.
        multiprocessing: Any = sys.modules.get("multiprocessing.util")
        if hasattr(multiprocessing, "register_after_fork"):
            multiprocessing.register_after_fork(self, _close_with_process)


class Observed:
    """A gauge's callback: calling it gives the value, None once its object is gone, or raises what it raises."""

    def __init__(
        self, instrument: Instrument, held: Callable[[], Callable[[], float] | None], bound: dict[str, Any]
    ) -> None:
        self.instrument, self.bound, self.failed = instrument, bound, False
        self._held = held

    def __call__(self) -> float | None:
        callback = self._held()
        return None if callback is None else numeric(self.instrument, (callback(),))[0]


def _after_fork(reference: weakref.ref[Core]) -> None:
    core = reference()
    if core is not None:
        core.after_fork()


def _close_with_process(core: Core) -> None:
    from multiprocessing import util

    util.Finalize(core, tell_all, ("close", core.outlets, CLOSE_TIMEOUT), exitpriority=0)
