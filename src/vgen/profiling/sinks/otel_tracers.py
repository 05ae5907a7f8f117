"""A tracer provider whose IDs do not collide across ranks, and that counts the spans it could not deliver."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator

from ..ids import new_span_id, new_trace_id

MAX_QUEUE = 2048
"""Spans that may wait for the collector if `OTEL_BSP_MAX_QUEUE_SIZE` is not set. Further ones are dropped."""


class RandomIds(IdGenerator):
    """IDs from the operating system's randomness.

    The SDK's generator uses `random`, which trainers often seed with the same seed on all ranks: the spans of all
    ranks would have the same IDs.
    """

    def generate_span_id(self) -> int:
        return int(new_span_id(), 16)

    def generate_trace_id(self) -> int:
        return int(new_trace_id(), 16)

    def is_trace_id_random(self) -> bool:
        return True


class CountingTracerProvider(TracerProvider):
    """A tracer provider that knows how many of its spans were `lost`. `OTelSink` adds them to its own losses."""

    closed = False
    _counts: _Counts | None = None

    @property
    def lost(self) -> int:
        counts = self._counts
        if counts is None:
            return 0
        return counts.accepted - counts.delivered if self.closed else counts.failed + counts.refused

    def export_to(self, exporter: SpanExporter) -> None:
        """Pass ended spans to `exporter`, in batches."""
        self._counts = _Counts()
        self.add_span_processor(_CountingProcessor(_CountingExporter(exporter, self._counts), self._counts))


class _Counts:
    """Of spans: accepted for delivery, delivered, failed to be delivered, and refused because the queue was full."""

    accepted = delivered = failed = refused = 0


class _CountingExporter(SpanExporter):
    def __init__(self, exporter: SpanExporter, counts: _Counts) -> None:
        self._exporter, self._counts = exporter, counts
        self.shutdown, self.force_flush = exporter.shutdown, exporter.force_flush

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is SpanExportResult.SUCCESS:
                self._counts.delivered += len(spans)
            else:
                self._counts.failed += len(spans)
        return result


class _CountingProcessor(BatchSpanProcessor):
    """Refuses spans before the SDK's queue is full. The SDK would not count the spans that it drops, and would log
    each of them, which takes half as long as the span itself."""

    def __init__(self, exporter: SpanExporter, counts: _Counts) -> None:
        self._limit = int(os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE) or MAX_QUEUE)
        super().__init__(exporter, max_queue_size=self._limit)
        self._counts, self._counting = counts, threading.Lock()

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        counts = self._counts
        with self._counting:  # several threads end spans, but only one exports
            counts.accepted += 1
            if counts.accepted - counts.delivered - counts.failed - counts.refused > self._limit:
                counts.refused += 1
                return
        super().on_end(span)
