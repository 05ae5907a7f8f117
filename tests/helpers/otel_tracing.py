"""Profiling contexts over an OpenTelemetry SDK, and what it exported."""

from __future__ import annotations

from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.otel_sdk import Providers, otlp_providers
from vgen.testing import MemorySink

DEADLINE = 0.25
"""Seconds that a close may take."""


class Traced:
    """A context with an SDK of its own, and a memory sink for comparison."""

    def __init__(self, **provider: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, **provider)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("caller")
        self.memory = MemorySink()
        self.profiling = ProfilingContext([OTelSink(self.provider), self.memory])

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def parents(self) -> dict[str, str | None]:
        """Each exported span's name and its parent's; `?` for a parent that was not exported."""
        spans = self.exporter.get_finished_spans()
        by_id = {span.context.span_id: span.name for span in spans}
        return {span.name: by_id.get(span.parent.span_id, "?") if span.parent else None for span in spans}


def current_name() -> str | None:
    return getattr(trace.get_current_span(), "name", None)


def exporting(**settings: Any) -> tuple[Providers, ProfilingContext]:
    """Providers from the `OTEL_*` variables, and a context that exports through them."""
    providers = otlp_providers(**settings)
    return providers, ProfilingContext([OTelSink(providers.tracer_provider, providers.meter_provider)])


def loop(profiling: ProfilingContext, steps: int = 20) -> None:
    """A loop of short steps."""
    for number in range(steps):
        with profiling.step(number):
            for _ in range(10):
                with profiling.span("work"):
                    profiling.record(semconv.REQUEST_E2E, 0.1)
