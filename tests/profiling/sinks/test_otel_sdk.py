"""Providers set up by vgen, exporting to a real OTLP receiver that reads everything back."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.collectors import GrpcCollector, HttpCollector, attributes
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.otel_sdk import Providers, otlp_providers, resource
from vgen.testing import MemorySink

Collector = HttpCollector | GrpcCollector


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch):
    for variable in [*os.environ]:
        if variable.startswith("OTEL_") or variable == "RANK":
            monkeypatch.delenv(variable)


@pytest.fixture(params=["http/protobuf", "grpc"])
def collector(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = HttpCollector() if request.param == "http/protobuf" else GrpcCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", request.param)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.endpoint)
    yield made
    made.close()


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpCollector]:
    made = HttpCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.endpoint)
    yield made
    made.close()


def run(providers: Providers, *more: Any) -> ProfilingContext:
    """A step of a training loop, recorded through `providers`."""
    profiling = ProfilingContext([OTelSink(providers.tracer_provider, providers.meter_provider), *more])
    bound = profiling.bind({semconv.ENGINE: "colocate"})
    with profiling.step(3), bound.span(semconv.GENERATE, {semconv.PROMPTS: 2}):
        with bound.span(semconv.ENGINE_GENERATE) as engine:
            pass
        bound.record_many(semconv.REQUEST_E2E, [0.3, 0.4])
        bound.record(semconv.SYNCED_BYTES, 2048)
        bound.rebuilt(semconv.REQUEST, engine.start_ns, engine.start_ns + 10, parent=engine, error="EngineError")
    return profiling


def test_what_a_step_records_arrives_whole(collector: Collector):
    memory = MemorySink()
    with otlp_providers() as providers:
        run(providers, memory).close()
        assert providers.close(10)
        assert providers.lost == 0
    assert len(collector.spans) == 4
    kept = {span.name: span for span in memory.spans}
    for span in collector.spans:
        ours = kept[span.name]
        assert span.trace_id.hex() == ours.trace_id
        assert span.span_id.hex() == ours.span_id
        assert span.parent_span_id.hex() == (ours.parent_id or "")
        assert span.start_time_unix_nano == ours.start_unix_ns
        assert span.end_time_unix_nano == ours.end_unix_ns
    generate, request = collector.span(semconv.GENERATE), collector.span(semconv.REQUEST)
    assert attributes(generate)[semconv.PROMPTS] == 2
    assert attributes(generate)[semconv.STEP_NUMBER] == 3
    assert request.parent_span_id == collector.span(semconv.ENGINE_GENERATE).span_id
    assert (request.status.code, request.status.message) == (Status.STATUS_CODE_ERROR, "EngineError")
    (point,) = collector.metric(semconv.REQUEST_E2E.name).histogram.data_points
    assert (point.count, list(point.explicit_bounds)) == (2, list(semconv.SECONDS))
    assert collector.metric(semconv.SYNCED_BYTES.name).sum.data_points[0].as_int == 2048
    assert collector.metric("gen_ai.server.request.duration").unit == "s"
    assert collector.metric("train.step.duration").histogram.data_points[0].count == 1
    assert not any(scope.schema_url for scope in collector.scopes)


def test_the_resource_tells_ranks_and_hosts_apart(collector: Collector):
    with otlp_providers(service_name="grpo", rank=3, attributes={semconv.RL_ALGORITHM: "grpo"}) as providers:
        run(providers)
    assert len(collector.resources) >= 2, "of the spans and of the metrics"
    for found in collector.resources:
        assert found[semconv.SERVICE_NAME] == "grpo"
        assert found[semconv.RANK] == 3
        assert found[semconv.HOST_NAME] == socket.gethostname()
        assert found[semconv.PROCESS_ID] == os.getpid()
        assert found[semconv.SERVICE_INSTANCE].endswith("rank3")
        assert found[semconv.RL_ALGORITHM] == "grpo"


def test_what_is_passed_goes_before_the_environment_and_that_before_what_is_found_out(monkeypatch: Any):
    assert resource().attributes[semconv.SERVICE_NAME] == "vgen"
    assert semconv.RANK not in resource().attributes
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.name=box,deployment.environment=lab")
    found = resource().attributes
    assert found[semconv.SERVICE_NAME] == "mine"
    assert found[semconv.HOST_NAME] == "box"
    assert found["deployment.environment"] == "lab"
    assert found[semconv.RANK] == 5
    passed = resource(service_name="passed", rank=0, attributes={"host.name": "other"}).attributes
    assert (passed[semconv.SERVICE_NAME], passed[semconv.RANK], passed[semconv.HOST_NAME]) == ("passed", 0, "other")


def test_headers_compression_and_endpoints_are_the_environments(http: HttpCollector, monkeypatch: Any):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=rl")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with otlp_providers() as providers:
        run(providers)
    assert http.headers[0]["x-team"] == "rl"
    assert http.headers[0]["content-encoding"] == "gzip"
    assert http.spans
    assert not http.metrics


def test_a_signal_has_a_protocol_of_its_own(http: HttpCollector, monkeypatch: Any):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with otlp_providers() as providers:
        run(providers)
    assert http.spans


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "carrier pigeon"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
    ],
)
def test_a_setting_that_is_not_known_is_named(monkeypatch: Any, variable: str, value: str):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} is '{value}'"):
        otlp_providers()


def test_the_sampler_is_the_environments(http: HttpCollector, monkeypatch: Any):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with otlp_providers() as providers:
        run(providers)
    assert not http.spans
    assert providers.lost == 0
    assert http.metric("vgen.generate.duration").histogram.data_points[0].count == 1


def test_two_pairs_of_providers_do_not_mix(monkeypatch: Any):
    collectors = [HttpCollector(), HttpCollector()]
    for number, collector in enumerate(collectors):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        with otlp_providers(rank=number) as providers:
            run(providers)
    for number, collector in enumerate(collectors):
        assert len(collector.spans) == 4
        assert {found[semconv.RANK] for found in collector.resources} == {number}
        collector.close()


def test_flushing_the_context_delivers(http: HttpCollector):
    with otlp_providers() as providers:
        profiling = run(providers)
        assert not http.spans
        assert profiling.flush(10)
        assert len(http.spans) == 4
        assert http.metrics


def test_the_sdk_does_not_close_the_providers_at_exit_by_itself(monkeypatch: Any):
    """It would wait for a dead collector, for up to half a minute."""
    registered: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda function, *_, **__: registered.append(function))
    monkeypatch.setattr("opentelemetry.sdk.metrics._internal.register", atexit.register)  # it imports the function
    with Providers(Resource.create({}), InMemorySpanExporter(), metric_readers=[InMemoryMetricReader()]):
        names = [getattr(function, "__qualname__", "") for function in registered]
    assert not [name for name in names if "shutdown" in name], names
