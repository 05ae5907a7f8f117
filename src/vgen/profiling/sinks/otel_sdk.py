"""OpenTelemetry's SDK, set up the right way for a trainer. Nothing global is set, and nothing here is needed by a
caller who has providers of their own."""

from __future__ import annotations

import logging
import os
import socket
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import MissingExtraError
from .. import names
from .deadline import within

try:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace.export import SpanExporter
except ImportError as error:
    raise MissingExtraError("vgen.profiling.sinks.otel_sdk", "OpenTelemetry's SDK", "otlp") from error

from .otel_tracers import RandomIds, Tracers

logger = logging.getLogger("vgen.telemetry")

CLOSE_TIMEOUT = 2.0
"""Seconds that `Providers.close` may take by default."""
SDK_PATIENCE = 60.0
"""More seconds than the SDK's own shutdown ever takes."""


def otlp_providers(
    *,
    service_name: str | None = None,
    rank: int | None = None,
    attributes: Mapping[str, Any] | None = None,
    metric_readers: Iterable[MetricReader] = (),
) -> Providers:
    """Providers that export over OTLP, as the standard `OTEL_*` variables say.

    `OTEL_EXPORTER_OTLP_PROTOCOL` is `http/protobuf` (the default) or `grpc`; endpoint, headers, timeout,
    sampler, batch sizes and export interval have their own variables, which the SDK reads. With
    `OTEL_TRACES_EXPORTER=none` or `OTEL_METRICS_EXPORTER=none` that signal is not exported.

    What is passed here goes before the environment. `attributes` are added to the resource;
    `metric_readers` read the metrics as well, such as `prometheus_reader`.

        with otlp_providers(service_name="grpo", attributes={"rl.algorithm": "grpo"}) as otlp:
            profiling = ProfilingContext([OTelSink(otlp.tracer_provider, otlp.meter_provider)])

    Raises:
        ValueError: A variable names a protocol or exporter that is not known here.
    """
    described = resource(service_name=service_name, rank=rank, attributes=attributes)
    spans = _span_exporter() if _exports("TRACES") else None
    metrics = _metric_exporter() if _exports("METRICS") else None
    return Providers(described, spans, metrics, metric_readers)


def resource(
    *, service_name: str | None = None, rank: int | None = None, attributes: Mapping[str, Any] | None = None
) -> Resource:
    """Who is speaking: service, host, process and trainer rank, so that ranks can be told apart.

    What is passed goes before `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME`, and those before what
    is found out here. The rank defaults to torchrun's `RANK`.
    """
    host, launched = socket.gethostname(), os.environ.get("RANK", "")
    own: dict[str, Any] = {names.SERVICE_NAME: "vgen", names.HOST_NAME: host, names.PROCESS_ID: os.getpid()}
    passed: dict[str, Any] = dict(attributes or {})
    if service_name is not None:
        passed[names.SERVICE_NAME] = service_name
    if rank is not None:
        passed[names.RANK] = rank
    elif launched.isdecimal():
        own[names.RANK] = rank = int(launched)
    own[names.SERVICE_INSTANCE] = f"{host}-{os.getpid()}" + ("" if rank is None else f"-rank{rank}")
    said = OTELResourceDetector().detect().attributes
    return Resource.create({**{name: value for name, value in own.items() if name not in said}, **passed})


class Providers:
    """A `tracer_provider` and a `meter_provider`, and an end of both that does not wait for a dead collector.

    Closes by itself at interpreter exit. After a fork the child has to make its own.
    """

    def __init__(
        self,
        described: Resource,
        span_exporter: SpanExporter | None = None,
        metric_exporter: MetricExporter | None = None,
        metric_readers: Iterable[MetricReader] = (),
    ) -> None:
        readers = list(metric_readers)
        if metric_exporter is not None:
            readers.append(PeriodicExportingMetricReader(metric_exporter))
        # Not the SDK's own end at exit: it waits for the collector, up to half a minute.
        self.tracer_provider = Tracers(resource=described, id_generator=RandomIds(), shutdown_on_exit=False)
        self.meter_provider = MeterProvider(readers, resource=described, shutdown_on_exit=False)
        if span_exporter is not None:
            self.tracer_provider.deliver(span_exporter)
        self._exporters: list[Any] = [exporter for exporter in (span_exporter, metric_exporter) if exporter is not None]
        self._pid, self._in_time = os.getpid(), False
        self._asked, self._over = threading.Event(), threading.Event()
        # Now: Python 3.12 and newer start no thread once the interpreter is on its way out.
        threading.Thread(target=self._close, name="vgen-otel-close", daemon=True).start()
        # Bound to a provider, which the callback itself keeps alive: so it runs at exit only, and there after the
        # contexts made later, which have something to hand on until then.
        self._at_exit = weakref.finalize(self.tracer_provider, self.close)

    @property
    def lost(self) -> int:
        """Spans that could not be delivered. Once closed, with those that were still waiting."""
        return self.tracer_provider.lost

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Export what is left and shut both down, within `timeout` seconds. Twice does no harm.

        False when that was not enough, or spans were lost; a warning then says how many.
        """
        if not self.tracer_provider.closed and os.getpid() == self._pid:
            self._at_exit.detach()
            self._asked.set()
            over = self._over.wait(timeout)
            self._in_time = over and self._in_time
            self.tracer_provider.closed = True
            if not over:  # they would go on trying, and complaining, behind our back
                within(0.0, *[exporter.shutdown for exporter in self._exporters])
            if self.lost or not self._in_time:
                logger.warning(
                    "vgen: OpenTelemetry closed with losses: %d spans were not delivered%s",
                    self.lost,
                    "" if over else f", and not everything ended within {timeout:.1f} s",
                )
        return self._in_time and not self.lost

    def __enter__(self) -> Providers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close(self) -> None:
        self._asked.wait()
        self._in_time = within(SDK_PATIENCE, self.tracer_provider.shutdown, self.meter_provider.shutdown)
        self._over.set()


def _exports(signal: str) -> bool:
    variable = f"OTEL_{signal}_EXPORTER"
    named = os.environ.get(variable, "").strip() or "otlp"
    if named not in ("otlp", "none"):
        raise ValueError(f"{variable} is {named!r}; otlp_providers knows `otlp` and `none`")
    return named == "otlp"


def _span_exporter() -> SpanExporter:
    if _over_grpc("TRACES"):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return OverGrpc()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _metric_exporter() -> MetricExporter:
    if _over_grpc("METRICS"):
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as OverGrpc

        return OverGrpc()
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter()


def _over_grpc(signal: str) -> bool:
    for variable in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(variable, "").strip()
        if protocol:
            if protocol not in ("grpc", "http/protobuf"):
                raise ValueError(f"{variable} is {protocol!r}; it must be `grpc` or `http/protobuf`")
            return protocol == "grpc"
    return False
