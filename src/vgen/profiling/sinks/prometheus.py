"""Prometheus, through OpenTelemetry's own exporter, set up so that each name is one series.

`vgen.generate.duration`, in seconds, becomes `vgen_generate_duration_seconds`; `docs/telemetry.md` lists all names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import needs_extra
from .otel_sdk import MeterProvider, resource

with needs_extra("vgen.profiling.sinks.prometheus", "OpenTelemetry's Prometheus exporter", "otlp"):
    from opentelemetry.exporter.prometheus import PrometheusMetricReader

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def prometheus_provider(
    registry: CollectorRegistry,
    *,
    service_name: str | None = None,
    rank: int | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> MeterProvider:
    """Make a meter provider whose metrics Prometheus can scrape from `registry`. The caller serves the registry.

    The resource (rank, host, and `attributes`) is the metric `target_info`.

        registry = CollectorRegistry()
        profiling = ProfilingContext([OTelSink(meter_provider=prometheus_provider(registry))])
        prometheus_client.start_http_server(9464, registry=registry)
    """
    process = resource(service_name=service_name, rank=rank, attributes=attributes)
    return MeterProvider([prometheus_reader(registry)], resource=process)


def prometheus_reader(registry: CollectorRegistry) -> PrometheusMetricReader:
    """Make only the reader. With `otlp_providers(metric_readers=[...])`, metrics go to OTLP and Prometheus.

    The series have no labels for the instrumentation scope: its version would start new series at each release.
    """
    return PrometheusMetricReader(scope_info_enabled=False, registry=registry)
