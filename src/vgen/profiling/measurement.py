"""What a metric is, and the values that were recorded for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Attributes: TypeAlias = "Mapping[str, Any]"
"""Attribute names to values: str, bool, int, float, or a sequence of one of these types."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """A metric: its OpenTelemetry name, kind, unit (UCUM) and description.

    Only the attributes listed in `attributes` become labels of the metric. All other attributes stay with the
    single record: a step number or a request ID as a label would create a new time series for each value.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str = "1"
    description: str = ""
    attributes: tuple[str, ...] = ()
    """The names of the labels."""
    boundaries: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets. If empty, those of the unit (`semconv.boundaries`)."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Values of one instrument that were recorded together."""

    instrument: Instrument
    values: Sequence[float]
    attributes: Attributes
    unix_ns: int
    """When they were recorded: Unix time in nanoseconds."""
    trace_id: str | None
    """The trace of the span that was open; None if no span was open."""
    span_id: str | None
    """The span that was open; None if no span was open."""
