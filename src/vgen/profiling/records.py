"""What a profiling context produces, and the protocol of what receives it.

Times are `time.monotonic_ns()`, the clock of vLLM's own request timestamps. `offset_ns` turns one into
wall-clock time; it is read once for each trace, so that a clock that is set back cannot bend a trace.
"""

from __future__ import annotations

import numbers
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from .sketch import Row

Attributes: TypeAlias = "Mapping[str, Any]"
"""Names to str, bool, int, float, or a sequence of one of these."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """A metric: OpenTelemetry's name, kind, unit (UCUM) and description.

    Only what `attributes` lists becomes a label of the metric. Everything else that is in force where
    the value is recorded stays with the record: a label with a step or a request id in it has no bound.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str = "1"
    description: str = ""
    attributes: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets; when empty, those of its unit (`names.boundaries`)."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Values of one instrument, recorded together."""

    instrument: Instrument
    values: Sequence[float]
    attributes: Attributes
    unix_ns: int
    trace_id: str | None
    """Of the span that was open, with `span_id`; None outside any span."""
    span_id: str | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at one moment within a span."""

    name: str
    time_ns: int
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Link:
    """A span of this or another trace that this span has to do with, but is not a child of."""

    trace_id: str
    span_id: str
    attributes: Attributes = field(default_factory=dict[str, Any])


class Span:
    """One timed piece of work: the handle while it is open, the record once it has ended.

    `attributes` is never changed in place, only replaced, so that a sink on another thread can keep
    what it was handed at the start. Once `end_ns` is set nothing changes any more.
    """

    __slots__ = (
        "attributes", "current", "end_ns", "error", "events", "handle", "inherited", "links", "maker", "name",
        "offset_ns", "parent", "parent_id", "sampled", "span_id", "start_ns", "step", "trace_id",
    )  # fmt: skip

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    parent: Span | None
    """The span of this process that it lies in, None for a root or beneath a remote parent."""
    step: Step | None
    """The step that it belongs to: itself for a step."""
    start_ns: int
    end_ns: int | None
    offset_ns: int
    attributes: dict[str, Any]
    inherited: dict[str, Any]
    """The attributes it was opened with, which everything beneath it is given too."""
    events: Sequence[Event]
    links: Sequence[Link]
    error: str | None
    """The type of the exception that ended it, None if it ended well."""
    current: bool
    """Whether it is what new spans nest under while open; false for one rebuilt after the fact."""
    maker: object
    sampled: bool
    """The sampled flag of its `traceparent`: the identity sink decides, for a whole trace; true without one."""
    handle: Any
    """The identity sink's own, to know the span again."""

    def set(self, attributes: Attributes | None = None, /, **more: Any) -> Span:
        """Add attributes, such as results known only at the end. After the end it does nothing."""
        if self.end_ns is None:
            self.attributes = {**self.attributes, **plain({**(attributes or {}), **more})}
        return self

    def event(self, name: str, attributes: Attributes | None = None, /, **more: Any) -> Span:
        """Note that something happened now."""
        if self.end_ns is None:
            self.events = (*self.events, Event(name, time.monotonic_ns(), plain({**(attributes or {}), **more})))
        return self

    def link(self, other: Span | Link, **attributes: Any) -> Span:
        """Point at another span: the sync that made a rollout's weights, the previous step."""
        if self.end_ns is None:
            self.links = (*self.links, Link(other.trace_id, other.span_id, plain(attributes)))
        return self

    @property
    def start_unix_ns(self) -> int:
        """When it started, as wall-clock time."""
        return self.start_ns + self.offset_ns

    @property
    def end_unix_ns(self) -> int | None:
        """When it ended, as wall-clock time. The difference to the start is the monotonic duration."""
        return None if self.end_ns is None else self.end_ns + self.offset_ns

    @property
    def duration(self) -> float | None:
        """Seconds, None while it is open."""
        return None if self.end_ns is None else (self.end_ns - self.start_ns) / 1e9

    def __repr__(self) -> str:
        took = "open" if self.end_ns is None else f"{self.duration:.6f} s"
        return f"<{type(self).__name__} {self.name} {self.span_id} {took}>"


class Step(Span):
    """The span of one training step. What is measured beneath it makes up its row."""

    __slots__ = ("number", "row")

    number: int
    row: Row

    def summary(self) -> dict[str, float]:
        """The step's numbers as a flat dict, for the trainer's own log call. Fixed once the step has ended.

        Histograms (and the seconds of every span, as `<span name>.duration`) give `.count`, `.sum`,
        `.min`, `.max`, `.p50`, `.p90`, `.p99`; counters their total; gauges their last value.
        """
        return self.row.summary()


@runtime_checkable
class Sink(Protocol):
    """Receives records. Subclass it and override what you need: what is not overridden costs nothing.

    An implementer may rely on this: calls never overlap for one sink; `on_start` of a span comes before
    its `on_end`; an exception never reaches the work being traced (after ten in a row the sink is
    switched off with one warning). `inline = True` means being called on the thread that does the work,
    for what must happen there and is quick, and then calls do overlap. `inline = False` means one
    worker thread, behind a bounded queue: it may be slow. `flush` and `close` always run on that worker;
    the caller leaves it behind when the time is over.
    """

    inline: bool = False

    def on_start(self, span: Span, attributes: Attributes) -> None:
        """A span was opened with `attributes`. (`span.attributes` may have grown since.)"""

    def on_end(self, span: Span) -> None:
        """A span has ended and changes no more."""

    def on_measurement(self, measurement: Measurement) -> None:
        """Values were recorded."""

    def on_step(self, step: Step) -> None:
        """A step has ended and its row is closed: `step.summary()` is final."""

    def on_observe(self, instrument: Instrument, read: Callable[[], float | None], attributes: Attributes) -> None:
        """A gauge that may be read at any time, from any thread; None once what it told of is gone.

        Its values at the ends of steps come to `on_measurement` all the same.
        """

    def on_idle(self) -> None:
        """The queue has just run empty: the moment to write out what was collected."""

    def flush(self, timeout: float) -> None:
        """Hand everything on, within `timeout` seconds."""

    def close(self, timeout: float) -> None:
        """Flush and let go of resources, within `timeout` seconds. Nothing is called afterwards."""


@runtime_checkable
class IdentitySink(Protocol):
    """An inline sink whose backend gives out span ids. A context takes at most one, and every sink records its ids.

    `identify` is called before any sink's `on_start`. It sets `trace_id` and `span_id` of the span, and
    may replace `parent_id`; when it returns false, or raises, vgen gives out ids of its own.
    """

    def identify(self, span: Span) -> bool: ...


_PLAIN = frozenset({str, bool, int, float, list, tuple})
_reported: set[type] = set()


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """`attributes` with values of other types than telemetry knows turned into strings, and None left out."""
    for value in attributes.values():
        if type(value) not in _PLAIN:
            return {k: v if type(v) in _PLAIN else _as_plain(k, v) for k, v in attributes.items() if v is not None}
    return attributes if type(attributes) is dict else dict(attributes)  # pyright: ignore[reportUnknownVariableType]


def _as_plain(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):  # NumPy's too
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if type(value) not in _reported:
        _reported.add(type(value))  # pyright: ignore[reportUnknownArgumentType]
        warnings.warn(
            f"vgen: attribute {key!r} has a value of type {type(value).__name__}, which telemetry cannot hold; "
            "it is recorded as a string, here and from now on",
            RuntimeWarning,
            stacklevel=5,
        )
    # a tensor's str would wait for its device and spell out its content
    return f"<{type(value).__name__}>" if hasattr(value, "device") else str(value)
