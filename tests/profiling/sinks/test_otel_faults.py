"""The collector refuses, hangs, dies half way or is overloaded: the loop does not notice, the end comes in time."""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.collectors import GrpcCollector, HttpCollector, refusing
from helpers.otel_tracing import DEADLINE, SLACK, exporting, loop
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
    """Nobody listens."""

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
    yield collector
    collector.close()


def test_the_end_comes_in_time_and_says_what_was_lost(faulty: Any, caplog: Any):
    check_the_end(caplog)


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_the_end_comes_in_time_over_grpc_too(fault: str, caplog: Any, monkeypatch: pytest.MonkeyPatch):
    collector = Refusing() if fault == "refuses" else GrpcCollector(hang=True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    check_the_end(caplog)
    collector.close()


def check_the_end(caplog: Any) -> None:
    """A loop, then the three ends in turn, each within its own deadline."""
    providers, profiling = exporting()
    loop(profiling)
    time.sleep(0.1)  # the trainer is busy with other work, and the exporter tries meanwhile
    loop(profiling)
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING, "vgen.telemetry"):
        assert not profiling.flush(DEADLINE)
        flushed = time.perf_counter()
        assert not profiling.close(DEADLINE)
        closed = time.perf_counter()
        assert not providers.close(DEADLINE)
        ended = time.perf_counter()
    assert flushed - start < DEADLINE + SLACK
    assert closed - flushed < DEADLINE + SLACK
    assert ended - closed < DEADLINE + SLACK
    assert providers.lost > 0
    (warning,) = [record.getMessage() for record in caplog.records if "spans were not delivered" in record.getMessage()]
    assert f"{providers.lost} spans" in warning
    assert not providers.close(DEADLINE), "twice does no harm, and tells the same"
    assert time.perf_counter() - ended < SLACK


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


def spans(profiling: ProfilingContext) -> tuple[float, float]:
    """Seconds of a thousand spans, and the 99th percentile of one."""
    taken: list[float] = []
    begin = time.perf_counter()
    for _ in range(1000):
        start = time.perf_counter()
        with profiling.span("work", prompts=1):
            pass
        taken.append(time.perf_counter() - start)
    return time.perf_counter() - begin, statistics.quantiles(taken, n=100)[98]


@pytest.mark.parametrize("faulty", list(FAULTS), indirect=True)
def test_the_loop_is_as_fast_as_with_a_healthy_collector(faulty: Any, monkeypatch: pytest.MonkeyPatch):
    dead_providers, dead = exporting()
    collector = HttpCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    alive_providers, alive = exporting()
    # In turn, and the quietest round of each: other processes use this machine too.
    rounds = [(spans(alive), spans(dead)) for _ in range(8)]
    (seconds, p99), (dead_seconds, dead_p99) = (
        (min(found[which][0] for found in rounds), min(found[which][1] for found in rounds)) for which in (0, 1)
    )
    assert dead_seconds < 1.5 * seconds + 0.02
    assert dead_p99 < 2 * p99 + 0.005, "a slice of the scheduler's: benchmarks/overhead.py measures without"
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
    """Such a process, and when it had ended."""
    code = f"""
import os, time
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = {refusing()!r}
os.environ["OTEL_EXPORTER_OTLP_PROTOCOL"] = {protocol!r}
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.otel_sdk import otlp_providers
providers = otlp_providers()
profiling = ProfilingContext([OTelSink(providers.tracer_provider, providers.meter_provider)])
with profiling.step(1):
    pass
print(time.time(), flush=True)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return run, time.time()


def test_a_process_that_forgets_to_close_exits_in_time():
    with ThreadPoolExecutor() as pool:  # at once: each waits for most of its time
        found = list(pool.map(forgets_to_close, ["http/protobuf", "grpc"]))
    for run, ended in found:
        assert run.returncode == 0, run.stderr
        # the context's deadline and the providers', 2 s each, and the interpreter's own end on a busy machine
        assert ended - float(run.stdout) < 2 * 2.0 + 2 * SLACK + 2.0
        assert "1 spans were not delivered" in run.stderr


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
