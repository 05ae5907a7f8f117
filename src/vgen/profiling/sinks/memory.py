"""Keeps all records in lists: for tests, notebooks, and the waterfall at the end of a run."""

from __future__ import annotations

from typing import TypeVar

from ..measurement import Attributes, Measurement
from ..span_model import Sink, Span, Step

T = TypeVar("T")


class MemorySink(Sink):
    """Keeps ended spans in the order in which they ended, measurements, and the summaries of ended steps.

    Each list holds at most `limit` records; when it is full, the oldest are dropped.
    """

    inline = True

    def __init__(self, limit: int = 100_000) -> None:
        self.limit = limit
        self.open: dict[str, Span] = {}
        """Open spans by span ID."""
        self.spans: list[Span] = []
        self.measurements: list[Measurement] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        """Step number and `step.summary()`."""

    def on_start(self, span: Span, attributes: Attributes) -> None:
        self.open[span.span_id] = span

    def on_end(self, span: Span) -> None:
        self.open.pop(span.span_id, None)
        self._append(self.spans, span)

    def on_measurement(self, measurement: Measurement) -> None:
        self._append(self.measurements, measurement)

    def on_step(self, step: Step) -> None:
        self._append(self.rows, (step.number, step.summary()))

    def after_fork(self) -> None:
        """Start empty in a forked child: what is recorded here happened in the parent process."""
        self.clear()
        self.open.clear()

    def named(self, name: str) -> list[Span]:
        """Return the ended spans of that name."""
        return [span for span in self.spans if span.name == name]

    def clear(self) -> None:
        """Drop everything that has ended."""
        self.spans.clear()
        self.measurements.clear()
        self.rows.clear()

    def _append(self, records: list[T], record: T) -> None:
        records.append(record)
        if len(records) > self.limit:
            del records[: self.limit // 10 + 1]
