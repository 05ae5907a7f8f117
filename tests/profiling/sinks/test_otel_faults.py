"""The collector refuses, hangs, dies half way or is overloaded: the loop does not notice, the end comes in time."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.collectors import GrpcCollector, HttpCollector, refusing
from helpers.operations import calls_made
from helpers.otel_tracing import DEADLINE, exporting, loop
from helpers.waiting import wait_until

from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.memory import MemorySink
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.otel_sdk import otlp_providers
from vgen.profiling.sinks.prometheus import prometheus_reader

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_export")]


def healthy() -> HttpCollector:
    return HttpCollector()


class Refusing:
    """Nobody listens, so that nobody sees a request either."""

    requests = "unseen"

    def __init__(self) -> None:
        self.endpoint = refusing()

    def close(self) -> None:
        pass


FAULTS: dict[str, Callable[[], Any]] = {
    "refuses": Refusing,
    "hangs": lambda: HttpCollector(hang=True),
    "dies half way": lambda: HttpCollector(fail_after=1),
    "is overloaded": lambda: HttpCollector(status=503),
}


@pytest.fixture(params=FAULTS)
def faulty(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    collector = FAULTS[request.param]()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    yield collector
    collector.close()


@pytest.mark.fault(
    point="an OpenTelemetry collector",
    did="The collector is gone, slow, silent or refuses, by HTTP",
    happens="`close` ends in time and counts the losses",
    within=60,
)
def test_the_end_comes_in_time_and_says_what_was_lost(faulty: Any, caplog: Any, waits: Any):
    check_the_end(faulty, caplog, waits)


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
@pytest.mark.fault(
    point="an OpenTelemetry collector",
    did="The same by gRPC",
    happens="`close` ends in time and counts the losses",
    within=60,
)
def test_the_end_comes_in_time_over_grpc_too(fault: str, caplog: Any, waits: Any, monkeypatch: pytest.MonkeyPatch):
    collector = Refusing() if fault == "refuses" else GrpcCollector(hang=True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    check_the_end(collector, caplog, waits)
    collector.close()


def check_the_end(collector: Any, caplog: Any, waits: Any) -> None:
    """A loop, then the three ends in turn, each within its own deadline."""
    providers, profiling = exporting()
    loop(profiling)
    wait_until(lambda: collector.requests)
    loop(profiling)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "vgen.telemetry"):
        for end in (profiling.flush, profiling.close):
            waits.clear()
            assert not end(DEADLINE)
            assert sum(waits) < DEADLINE + 0.01
        assert not providers.close(DEADLINE)
    assert providers.lost > 0
    (warning,) = [record.getMessage() for record in caplog.records if "spans were not delivered" in record.getMessage()]
    assert f"{providers.lost} spans" in warning
    assert not providers.close(DEADLINE), "twice does no harm, and tells the same"
    assert time.monotonic() - start < 20, "nobody has waited for the exporter, which tries for a minute"


@pytest.mark.fault(point="an OpenTelemetry collector", did="Traces hang", happens="The metrics arrive", within=60)
def test_traces_that_hang_do_not_keep_the_metrics_back(monkeypatch: pytest.MonkeyPatch):
    hanging, collector = HttpCollector(hang=True), HttpCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", hanging.endpoint + "/v1/traces")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", collector.endpoint + "/v1/metrics")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "60000")
    providers, profiling = exporting()
    loop(profiling, 3)
    assert not profiling.flush(0.5)  # in which the metrics must arrive
    assert collector.metric("train.step.duration").histogram.data_points[0].count == 3
    loop(profiling, 2)
    assert not providers.close(0.5)
    assert collector.metric("train.step.duration").histogram.data_points[0].count == 5
    hanging.close()
    collector.close()


@pytest.mark.fault(
    point="an OpenTelemetry collector",
    did="The collector comes back",
    happens="It gets the totals",
    within=60,
)
def test_a_collector_that_comes_back_gets_the_totals(monkeypatch: pytest.MonkeyPatch):
    """Metrics are cumulative: an outage costs resolution and no count."""
    collector = HttpCollector(status=503)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    providers, profiling = exporting()
    for _ in range(3):
        profiling.record(semconv.GENERATED_TOKENS, 10)
    wait_until(lambda: collector.requests)
    collector.status = 200
    assert providers.close(5)
    assert collector.metric(semconv.GENERATED_TOKENS.name).sum.data_points[0].as_int == 30
    collector.close()


@pytest.mark.parametrize("faulty", list(FAULTS), indirect=True)
def test_the_loop_does_what_it_does_with_a_healthy_collector(faulty: Any, monkeypatch: pytest.MonkeyPatch):
    dead_providers, dead = exporting()
    collector = HttpCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    alive_providers, alive = exporting()
    start = time.monotonic()
    for _ in range(3):  # together more than the SDK's queue holds
        operations = calls_made(lambda: loop(alive, 80))
        assert calls_made(lambda: loop(dead, 80)) < 1.1 * operations
    assert time.monotonic() - start < 30, "it has not waited for the exporter, which tries for a minute"
    alive_providers.close(5)
    dead_providers.close(0.0)
    collector.close()


@pytest.mark.parametrize("faulty", list(FAULTS), indirect=True)
def test_the_other_sinks_and_readers_get_all_of_it(faulty: Any):
    from prometheus_client import CollectorRegistry, generate_latest

    registry, memory = CollectorRegistry(), MemorySink()
    providers = otlp_providers(metric_readers=[prometheus_reader(registry)])
    profiling = ProfilingContext([OTelSink(providers.tracer_provider, providers.meter_provider), memory])
    loop(profiling)
    assert len(memory.spans) == 220
    assert "vgen_request_e2e_seconds_count 200.0" in generate_latest(registry).decode()
    profiling.close(DEADLINE)
    assert not providers.close(DEADLINE)


def forgets_to_close(protocol: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Such a process, and the seconds that it took."""
    code = f"""
import os
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = {refusing()!r}
os.environ["OTEL_EXPORTER_OTLP_PROTOCOL"] = {protocol!r}
os.environ["OTEL_EXPORTER_OTLP_TIMEOUT"] = "100"
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.otel_sdk import otlp_providers
providers = otlp_providers()
profiling = ProfilingContext([OTelSink(providers.tracer_provider, providers.meter_provider)])
with profiling.step(1):
    pass
"""
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    return run, time.monotonic() - start


@pytest.mark.fault(
    point="an OpenTelemetry collector",
    did="A process with a dead collector does not close",
    happens="It exits in time",
    within=60,
)
def test_a_process_that_forgets_to_close_exits_in_time():
    with ThreadPoolExecutor() as pool:  # at once: each waits for most of its time
        found = list(pool.map(forgets_to_close, ["http/protobuf", "grpc"]))
    for run, seconds in found:
        assert run.returncode == 0, run.stderr
        assert seconds < 60, "the exporters try for longer"
        assert "1 spans were not delivered, and not everything ended within 2.0 s" in run.stderr


def test_a_process_that_forgets_to_close_delivers_where_it_can(monkeypatch: pytest.MonkeyPatch):
    collector = HttpCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.delenv("OTEL_BSP_SCHEDULE_DELAY")
    monkeypatch.delenv("OTEL_METRIC_EXPORT_INTERVAL")
    code = """
from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.otel_sdk import otlp_providers
providers = otlp_providers()
profiling = ProfilingContext([OTelSink(providers.tracer_provider, providers.meter_provider)])
with profiling.step(1):
    profiling.record(semconv.GENERATED_TOKENS, 3)
    raise SystemExit(3)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (3, "")
    assert collector.span(semconv.STEP).status.message == "SystemExit"
    assert collector.metric(semconv.GENERATED_TOKENS.name).sum.data_points[0].as_int == 3
    collector.close()
