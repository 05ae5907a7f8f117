"""What a profiling context produces, and the protocol of what receives it.

Times are `time.monotonic_ns()`, the clock of vLLM's own request timestamps. `offset_ns` turns one into
wall-clock time; it is read once for each trace, so that a clock that is set back cannot bend a trace.
"""

from __future__ import annotations

import json
import logging
import numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from .sketch import Row

logger = logging.getLogger("vgen.telemetry")

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
        added = plain({**(attributes or {}), **more})
        if self.end_ns is None:
            # No call within the expression, so no other thread's change comes between. So too below.
            self.attributes = {**self.attributes, **added}
        return self

    def event(self, name: str, attributes: Attributes | None = None, /, **more: Any) -> Span:
        """Note that something happened now."""
        event = Event(name, time.monotonic_ns(), plain({**(attributes or {}), **more}))
        if self.end_ns is None:
            self.events = (*self.events, event)
        return self

    def link(self, other: Span | Link, **attributes: Any) -> Span:
        """Point at another span: the sync that made a rollout's weights, the previous step."""
        link = Link(other.trace_id, other.span_id, plain(attributes))
        if self.end_ns is None:
            self.links = (*self.links, link)
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
    its `on_end`; an `Exception` never reaches the work being traced (after ten in a row from one method
    the sink is switched off with one warning). `inline = True` means being called on the thread that does
    the work, for what must happen there and is quick, and then calls do overlap. `inline = False` means one
    worker thread, behind a bounded queue: it may be slow. `flush` and `close` always run on that worker;
    the caller leaves it behind when the time is over.

    What a sink itself does while it is called is not recorded by the context that calls it: its spans
    would be its own food. Records that it took without an exception and could not hand on, it may count
    in an attribute or property `lost`.
    """

    inline: bool = False
    quiet: bool = False
    """An inline sink's promise that nothing beneath it records through the context that calls it. The guard against
    that costs about half a microsecond a span."""

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

    def after_fork(self) -> None:
        """This is a forked child now. What was collected and not yet written is the parent's to write."""


@runtime_checkable
class IdentitySink(Protocol):
    """An inline sink whose backend gives out span ids. A context takes at most one, and every sink records its ids.

    `identify` is called before any sink's `on_start`. It sets `trace_id` and `span_id` of the span, and
    may replace `parent_id`; when it returns false, or raises, vgen gives out ids of its own.
    """

    def identify(self, span: Span) -> bool: ...


_PLAIN = frozenset({str, bool, int, float})
_LISTS = frozenset({list, tuple})
_CONTAINERS: tuple[Any, ...] = (Mapping, Set, Sequence)
_LARGEST = float.fromhex("0x1.fffffffffffffp+1023")
_reported: set[str] = set()


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """`attributes` with values of other types than telemetry knows turned into strings, and None left out."""
    for key, value in attributes.items():
        if type(value) not in _PLAIN or type(key) is not str:
            return {_key(k): _as_plain(k, v) for k, v in attributes.items() if v is not None}
    return attributes if type(attributes) is dict else dict(attributes)  # pyright: ignore[reportUnknownVariableType]


def numeric(instrument: Instrument, values: Iterable[Any]) -> Sequence[float]:
    """`values` as ints and floats within float's range. What is no number becomes NaN."""
    kept = tuple(values)
    if set(map(type, kept)) <= {float}:
        return kept
    return tuple([value if type(value) is float else _as_number(instrument.name, value) for value in kept])


def _as_number(name: str, value: Any) -> float:
    try:
        if isinstance(value, numbers.Integral):
            whole = int(value)
            return whole if -_LARGEST <= whole <= _LARGEST else float("inf") if whole > 0 else float("-inf")
        if not hasattr(value, "device") or isinstance(value, numbers.Real):  # a tensor's float waits for its device
            return float(value)
    except Exception:
        pass
    _report(name, value, "is not a number and is recorded as NaN")
    return float("nan")


def _key(key: object) -> str:
    return str.__str__(key) if isinstance(key, str) else as_text(key)


def _as_plain(key: object, value: Any) -> Any:
    if type(value) in _LISTS:
        return value if _PLAIN.issuperset(map(type, value)) else [_as_item(key, item) for item in value]
    return _as_item(key, value)


def _as_item(key: object, value: Any) -> Any:
    if type(value) in _PLAIN or value is None:
        return value
    try:
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, numbers.Integral):  # NumPy's too
            return int(value)
        if isinstance(value, numbers.Real):
            return float(value)
        if type(value).__name__ in ("bool", "bool_"):  # NumPy's again, which is no Integral
            return bool(value)
    except Exception:
        pass
    _report(key, value, "is not for telemetry and is recorded as a string")
    return as_text(value)


def as_text(value: Any) -> str:
    """`value` as a string, whatever it is: without raising, and without waiting for a device."""
    try:
        if isinstance(value, _CONTAINERS):
            return json.dumps(value)  # and not `str`, which would spell out the tensors in it
        if not hasattr(value, "device"):  # a tensor's `str` would wait for its device and spell out its content
            return str(value)
    except Exception:
        pass
    return f"<{type(value).__name__}>"


def _report(name: object, value: Any, what: str) -> None:
    """Say so once for each type. By the logger: a warning may be made an exception, and stop the work."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if kind not in _reported:
        _reported.add(kind)
        logger.warning("vgen: a value of type %s (first for %r) %s, here and from now on", kind, name, what)
