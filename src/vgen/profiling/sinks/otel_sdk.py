"""Providers of OpenTelemetry's SDK, set up for a trainer. Sets nothing global.

Callers who have their own providers do not need this module.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import weakref
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from ...errors import needs_extra
from .. import semconv
from .deadline import within

with needs_extra("vgen.profiling.sinks.otel_sdk", "OpenTelemetry's SDK", "otlp"):
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace.export import SpanExporter

from .otel_tracers import CountingTracerProvider, RandomIds

logger = logging.getLogger("vgen.telemetry")

CLOSE_TIMEOUT = 2.0
"""Seconds that `Providers.close` may take by default."""
SDK_SHUTDOWN_SECONDS = 60.0
"""Longer than the SDK's own shutdown ever takes."""


def otlp_providers(
    *,
    service_name: str | None = None,
    rank: int | None = None,
    attributes: Mapping[str, Any] | None = None,
    metric_readers: Iterable[MetricReader] = (),
) -> Providers:
    """Make providers that export over OTLP, configured by the standard `OTEL_*` variables.

    `OTEL_EXPORTER_OTLP_PROTOCOL` is `http/protobuf` (the default) or `grpc`. The SDK reads the variables for endpoint,
    headers, timeout, sampler, batch sizes and export interval. `OTEL_TRACES_EXPORTER=none` and
    `OTEL_METRICS_EXPORTER=none` turn off the export of that signal. Arguments have priority over the environment.

    Args:
        service_name: The resource attribute `service.name`.
        rank: The resource attribute `vgen.rank`; by default torchrun's `RANK`.
        attributes: Further resource attributes.
        metric_readers: These read the metrics as well, for example `prometheus_reader`.

    Raises:
        ValueError: A variable names a protocol or exporter that vgen does not support.

    Example:
        with otlp_providers(service_name="grpo", attributes={"rl.algorithm": "grpo"}) as otlp:
            profiling = ProfilingContext([OTelSink(otlp.tracer_provider, otlp.meter_provider)])
    """
    process = resource(service_name=service_name, rank=rank, attributes=attributes)
    return Providers(process, _exporter("trace", "Span"), _exporter("metric", "Metric"), metric_readers)


def resource(
    *, service_name: str | None = None, rank: int | None = None, attributes: Mapping[str, Any] | None = None
) -> Resource:
    """Describe this process: service, host, process ID and trainer rank, so that ranks can be told apart.

    Arguments have priority over `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME`, and these over what is detected
    here. The rank is by default torchrun's `RANK`.
    """
    host, launched = socket.gethostname(), os.environ.get("RANK", "")
    detected: dict[str, Any] = {semconv.SERVICE_NAME: "vgen", semconv.HOST_NAME: host, semconv.PROCESS_ID: os.getpid()}
    passed: dict[str, Any] = dict(attributes or {})
    if service_name is not None:
        passed[semconv.SERVICE_NAME] = service_name
    if rank is not None:
        passed[semconv.RANK] = rank
    elif launched.isdecimal():
        detected[semconv.RANK] = rank = int(launched)
    detected[semconv.SERVICE_INSTANCE] = f"{host}-{os.getpid()}" + ("" if rank is None else f"-rank{rank}")
    environment = OTELResourceDetector().detect().attributes
    return Resource.create({**{k: value for k, value in detected.items() if k not in environment}, **passed})


class Providers:
    """A `tracer_provider` and a `meter_provider`, with a `close` that does not wait for a dead collector.

    They close automatically at interpreter exit. After a fork, the child process must make its own.
    """

    def __init__(
        self,
        process: Resource,
        span_exporter: SpanExporter | None = None,
        metric_exporter: MetricExporter | None = None,
        metric_readers: Iterable[MetricReader] = (),
    ) -> None:
        readers = list(metric_readers)
        if metric_exporter is not None:
            readers.append(PeriodicExportingMetricReader(metric_exporter))
        # No `shutdown_on_exit`: the SDK would wait for the collector for up to half a minute.
        self.tracer_provider = CountingTracerProvider(
            resource=process, id_generator=RandomIds(), shutdown_on_exit=False
        )
        self.meter_provider = MeterProvider(readers, resource=process, shutdown_on_exit=False)
        if span_exporter is not None:
            self.tracer_provider.export_to(span_exporter)
        self._exporters: list[Any] = [exporter for exporter in (span_exporter, metric_exporter) if exporter is not None]
        self._pid, self._shutdown_succeeded = os.getpid(), False
        self._close_requested, self._shutdown_done = threading.Event(), threading.Event()
        # The thread starts now: Python 3.12 starts no threads during interpreter shutdown.
        threading.Thread(target=self._shut_down, name="vgen-otel-close", daemon=True).start()
        # The finalizer is on the provider, which its own callback keeps alive. So it runs only at interpreter exit,
        # after the finalizers of contexts that were made later: these still have records to export.
        self._at_exit = weakref.finalize(self.tracer_provider, self.close)

    @property
    def lost(self) -> int:
        """Spans that could not be delivered. After `close` this includes those that were still waiting."""
        return self.tracer_provider.lost

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Export what is left and shut both providers down, within `timeout` seconds. A second call has no effect.

        Returns False if that took longer, or spans were lost; a warning then says how many.
        """
        if not self.tracer_provider.closed and os.getpid() == self._pid:
            self._at_exit.detach()
            self._close_requested.set()
            done = self._shutdown_done.wait(timeout)
            self._shutdown_succeeded = done and self._shutdown_succeeded
            self.tracer_provider.closed = True
            if not done:  # otherwise the exporters would keep trying, and logging, in the background
                within(0.0, *[exporter.shutdown for exporter in self._exporters])
            if self.lost or not self._shutdown_succeeded:
                late = "" if done else f", and not everything ended within {timeout:.1f} s"
                logger.warning("vgen: OpenTelemetry closed with losses: %d spans were not delivered%s", self.lost, late)
        return self._shutdown_succeeded and not self.lost

    def __enter__(self) -> Providers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shut_down(self) -> None:
        self._close_requested.wait()
        shutdowns = self.tracer_provider.shutdown, self.meter_provider.shutdown
        self._shutdown_succeeded = within(SDK_SHUTDOWN_SECONDS, *shutdowns)
        self._shutdown_done.set()


def _exporter(module: str, kind: str) -> Any:
    """The OTLP exporter that the environment asks for; None if it turns that signal off."""
    signal = f"{module.upper()}S"
    variable = f"OTEL_{signal}_EXPORTER"
    exporter = os.environ.get(variable, "").strip() or "otlp"
    if exporter not in ("otlp", "none"):
        raise ValueError(f"{variable} is {exporter!r}; otlp_providers supports `otlp` and `none`")
    if exporter == "none":
        return None
    variables = (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocols = ((variable, os.environ.get(variable, "").strip()) for variable in variables)
    variable, protocol = next((pair for pair in protocols if pair[1]), ("", "http/protobuf"))
    if protocol not in ("grpc", "http/protobuf"):
        raise ValueError(f"{variable} is {protocol!r}; it must be `grpc` or `http/protobuf`")
    package = "opentelemetry.exporter.otlp.proto." + protocol.partition("/")[0]
    return getattr(import_module(f"{package}.{module}_exporter"), f"OTLP{kind}Exporter")()
