"""Prometheus is OpenTelemetry's own exporter: this sets it up so that one name means one series.

`vgen.generate.duration` in seconds is `vgen_generate_duration_seconds` there; `docs/telemetry.md` lists all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import MissingExtraError
from .otel_sdk import MeterProvider, resource

try:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
except ImportError as error:
    raise MissingExtraError("vgen.profiling.sinks.prometheus", "OpenTelemetry's Prometheus exporter", "otlp") from error

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def prometheus_provider(
    registry: CollectorRegistry,
    *,
    service_name: str | None = None,
    rank: int | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> MeterProvider:
    """A meter provider whose metrics are to be scraped from `registry`. Who serves that is the caller's affair.

    The resource (rank, host and what `attributes` add) is the metric `target_info`.

        registry = CollectorRegistry()
        profiling = ProfilingContext([OTelSink(meter_provider=prometheus_provider(registry))])
        prometheus_client.start_http_server(9464, registry=registry)
    """
    described = resource(service_name=service_name, rank=rank, attributes=attributes)
    return MeterProvider([prometheus_reader(registry)], resource=described)


def prometheus_reader(registry: CollectorRegistry) -> PrometheusMetricReader:
    """The reader alone, to be passed to `otlp_providers(metric_readers=...)`, which then exports both ways.

    Without labels of the instrumentation scope: they would be on every series and split it at each new version.
    """
    return PrometheusMetricReader(scope_info_enabled=False, registry=registry)
