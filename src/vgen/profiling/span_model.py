"""Spans, steps, and the `Sink` protocol: what a profiling context produces, and what receives it.

Times are `time.monotonic_ns()`, which is also the clock of vLLM's request timestamps. Adding `offset_ns` gives
wall-clock time. The offset is read once for each trace, so a clock that is set back cannot distort a trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from .aggregation import Row
from .measurement import Attributes, Instrument, Measurement
from .value_conversion import plain


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at one moment within a span."""

    name: str
    time_ns: int
    """On the clock of `time.monotonic_ns`."""
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Link:
    """A reference from one span to another that is not its parent. The other may be in another trace."""

    trace_id: str
    span_id: str
    attributes: Attributes = field(default_factory=dict[str, Any])


@dataclass(slots=True, init=False, eq=False, repr=False)
class Span:
    """One timed piece of work: a handle while it is open, a record after it has ended.

    `attributes`, `events` and `links` are replaced, never changed in place: a sink on another thread can keep the
    object that it received. Nothing changes after `end_ns` is set.
    """

    name: str
    trace_id: str
    """32 hexadecimal digits (W3C Trace Context)."""
    span_id: str
    """16 hexadecimal digits."""
    parent_id: str | None
    parent: Span | None
    """The parent in this process. None for a root span, and if the parent is in another process."""
    step: Step | None
    """The step that the span belongs to. A step belongs to itself."""
    start_ns: int
    end_ns: int | None
    offset_ns: int
    """Wall-clock time minus monotonic time, in nanoseconds."""
    attributes: dict[str, Any]
    inherited: dict[str, Any]
    """The attributes that the span was opened with. Its children inherit them."""
    events: Sequence[Event]
    links: Sequence[Link]
    error: str | None
    """The type of the exception that ended the span; None if it ended without one."""
    current: bool
    """Whether new spans become its children while it is open. False for detached and rebuilt spans."""
    scope: object
    """The context manager that opened the span, while it is open."""
    sampled: bool
    """The sampled flag of its `traceparent`. The identity sink, which assigns span IDs as `OTelSink` does, decides for
    a whole trace; true without such a sink."""
    handle: Any
    """For the identity sink, which alone reads and writes it."""

    def set(self, attributes: Attributes | None = None, /, **more: Any) -> Span:
        """Add attributes, for example results that are known only at the end. No effect after the end."""
        added = plain({**(attributes or {}), **more})
        if self.end_ns is None:
            # One expression without a call inside: no other thread can write in between. The same in the next two.
            self.attributes = {**self.attributes, **added}
        return self

    def event(self, name: str, attributes: Attributes | None = None, /, **more: Any) -> Span:
        """Record that something happened now. No effect after the end."""
        event = Event(name, time.monotonic_ns(), plain({**(attributes or {}), **more}))
        if self.end_ns is None:
            self.events = (*self.events, event)
        return self

    def link(self, other: Span | Link, **attributes: Any) -> Span:
        """Refer to another span, such as the sync that made a rollout's weights. No effect after the end."""
        link = Link(other.trace_id, other.span_id, plain(attributes))
        if self.end_ns is None:
            self.links = (*self.links, link)
        return self

    @property
    def start_unix_ns(self) -> int:
        """The start as wall-clock time: Unix nanoseconds."""
        return self.start_ns + self.offset_ns

    @property
    def end_unix_ns(self) -> int | None:
        """The end as wall-clock time. `end_unix_ns - start_unix_ns` is still the monotonic duration."""
        return None if self.end_ns is None else self.end_ns + self.offset_ns

    @property
    def duration(self) -> float | None:
        """Seconds from start to end; None while the span is open."""
        return None if self.end_ns is None else (self.end_ns - self.start_ns) / 1e9

    def __repr__(self) -> str:
        state = "open" if self.end_ns is None else f"{self.duration:.6f} s"
        return f"<{type(self).__name__} {self.name} {self.span_id} {state}>"


@dataclass(slots=True, init=False, eq=False, repr=False)
class Step(Span):
    """The span of one training step. Its row aggregates everything that is measured within it."""

    number: int
    row: Row

    def summary(self) -> dict[str, float]:
        """Return the step's numbers as a flat dict, for the trainer's log call. They are fixed when the step ends.

        Each histogram, and the seconds of each span as `<span name>.duration`, gives `.count`, `.sum`, `.min`,
        `.max`, `.p50`, `.p90` and `.p99`. A counter gives its total, a gauge its last value.
        """
        return self.row.summary()


@runtime_checkable
class Sink(Protocol):
    """Receives records. Subclass it and override the methods that you need; the others cost nothing.

    Guarantees to an implementer:

    - With `inline = False` (the default), one worker thread makes all calls, from a bounded queue: a sink may be
      slow, and calls never overlap. With `inline = True`, the thread that does the work makes the calls, and calls
      from several threads may overlap: only for sinks that are fast and must run there.
    - `on_start` of a span comes before its `on_end`.
    - An `Exception` never reaches the work. After ten in a row from one method vgen switches the sink off and logs
      one warning.
    - `flush` and `close` always run on the worker thread. The caller stops waiting after `timeout` seconds.
    - Spans that a sink opens while it is called are not recorded by the context that calls it. This prevents
      recursion.

    A sink may count records that it accepted but could not deliver in an attribute or property `lost`.
    """

    inline: bool = False
    quiet: bool = False
    """For an inline sink that never records through the context that calls it. vgen then skips the guard against
    recursion, which costs about half a microsecond for each span."""

    def on_start(self, span: Span, attributes: Attributes) -> None:
        """A span was opened with `attributes`. (`span.attributes` may have more by now.)"""

    def on_end(self, span: Span) -> None:
        """A span has ended. It does not change any more."""

    def on_measurement(self, measurement: Measurement) -> None:
        """Values were recorded."""

    def on_step(self, step: Step) -> None:
        """A step has ended and its row is closed: `step.summary()` is final."""

    def on_observe(self, instrument: Instrument, read: Callable[[], float | None], attributes: Attributes) -> None:
        """A gauge was registered. `read` may be called at any time, from any thread; it returns None when the
        observed object no longer exists.

        Its value at the end of each step also arrives at `on_measurement`.
        """

    def on_idle(self) -> None:
        """The queue is empty: a good moment to write out what was collected."""

    def flush(self, timeout: float) -> None:
        """Deliver everything, within `timeout` seconds."""

    def close(self, timeout: float) -> None:
        """Deliver everything and release what the sink itself opened, within `timeout` seconds."""

    def after_fork(self) -> None:
        """This process is a forked child. The parent process delivers what was collected before the fork."""


@runtime_checkable
class IdentitySink(Protocol):
    """An inline sink whose backend assigns span IDs. A context takes at most one; all other sinks record its IDs.

    vgen calls `identify` before `on_start` of any sink. It sets `trace_id` and `span_id` of the span, and may
    replace `parent_id`. If it returns false or raises, vgen assigns its own IDs.
    """

    def identify(self, span: Span) -> bool: ...
