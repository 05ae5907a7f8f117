"""Keeps everything in lists: for tests, notebooks and the waterfall at the end of a run."""

from __future__ import annotations

from typing import TypeVar

from ..records import Attributes, Measurement, Sink, Span, Step

T = TypeVar("T")


class MemorySink(Sink):
    """Holds ended spans in the order of their ends, measurements, and the rows of ended steps.

    `limit` bounds each of the lists; the oldest go first.
    """

    inline = True

    def __init__(self, limit: int = 100_000) -> None:
        self.limit = limit
        self.open: dict[str, Span] = {}
        self.spans: list[Span] = []
        self.measurements: list[Measurement] = []
        self.rows: list[tuple[int, dict[str, float]]] = []

    def on_start(self, span: Span, attributes: Attributes) -> None:
        self.open[span.span_id] = span

    def on_end(self, span: Span) -> None:
        self.open.pop(span.span_id, None)
        self._keep(self.spans, span)

    def on_measurement(self, measurement: Measurement) -> None:
        self._keep(self.measurements, measurement)

    def on_step(self, step: Step) -> None:
        self._keep(self.rows, (step.number, step.summary()))

    def after_fork(self) -> None:
        """In a forked child it begins empty: what is in here happened in the parent."""
        self.clear()
        self.open.clear()

    def named(self, name: str) -> list[Span]:
        """The ended spans of that name."""
        return [span for span in self.spans if span.name == name]

    def clear(self) -> None:
        """Forget what has ended."""
        self.spans.clear()
        self.measurements.clear()
        self.rows.clear()

    def _keep(self, records: list[T], record: T) -> None:
        records.append(record)
        if len(records) > self.limit:
            del records[: self.limit // 10 + 1]
