"""Prometheus, by OpenTelemetry's own exporter: one spelling of every name, checked by a real Prometheus."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.scraper import needs_prometheus, needs_promtool, scraping, wait_for
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from vgen.profiling import Instrument, ProfilingContext, semconv
from vgen.profiling.semconv_docs import prometheus_name
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.prometheus import prometheus_provider

OBSERVED = Instrument("vgen.engine.age", "gauge", "s", "Seconds in the state.", (semconv.ENGINE,))
DURATIONS = [semconv.duration(span.name) for span in semconv.SPANS.values() if not span.selected]
GEN_AI = {alias.instrument.name: alias.instrument for alias in semconv.GEN_AI.metrics}
EVERY_METRIC = [*semconv.METRICS.values(), *DURATIONS, OBSERVED, *GEN_AI.values()]


def emit_everything(registry: CollectorRegistry) -> ProfilingContext:
    """Each metric and each span once, in a process that plays both a server and a client."""
    provider = prometheus_provider(registry, service_name="grpo", rank=2)
    profiling = ProfilingContext([OTelSink(meter_provider=provider)])
    profiling.bind({semconv.ENGINE: "colocate"}).observe(OBSERVED, lambda: 7.0)
    for engine in ("colocate", "server"):
        bound = profiling.bind({semconv.ENGINE: engine, semconv.MODEL: "tiny"})
        for instrument in semconv.METRICS.values():
            bound.record(instrument, 3)
    bound = profiling.bind({semconv.ENGINE: "colocate"})
    for name in semconv.SPANS:
        with bound.span(name):
            pass
    return profiling


@pytest.fixture(scope="module")
def exposition() -> str:
    registry = CollectorRegistry()
    profiling = emit_everything(registry)
    text = generate_latest(registry).decode()
    profiling.close()
    return text


def families(exposition: str) -> dict[str, str]:
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposition, re.M))


@pytest.mark.parametrize("metric", EVERY_METRIC, ids=lambda metric: metric.name)
def test_the_reference_page_spells_each_metric_as_prometheus_sees_it(exposition: str, metric: Instrument):
    assert families(exposition)[prometheus_name(metric)] == metric.kind


def test_there_is_nothing_else(exposition: str):
    assert set(families(exposition)) == {prometheus_name(metric) for metric in EVERY_METRIC} | {"target_info"}


def test_series_have_no_labels_of_the_scope_and_target_info_tells_the_rank(exposition: str):
    assert "otel_scope" not in exposition
    assert re.search(r'^vgen_generate_output_tokens_total{vgen_engine_kind="colocate"} 3.0$', exposition, re.M)
    (target,) = re.findall(r"^target_info{(.*)} 1.0$", exposition, re.M)
    assert 'service_name="grpo"' in target
    assert 'vgen_rank="2"' in target
    assert "host_name=" in target


def test_buckets_are_ours(exposition: str):
    bounds = re.findall(
        r'^vgen_generate_duration_seconds_bucket{le="([^"]+)",vgen_engine_kind="colocate"}', exposition, re.M
    )
    assert [float(bound) for bound in bounds] == [*semconv.SECONDS, float("inf")]


def test_the_default_registry_is_left_alone(exposition: str):
    assert "vgen" not in generate_latest(REGISTRY).decode()


@needs_promtool
def test_promtool_finds_no_fault(exposition: str):
    checked = subprocess.run(["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True)
    # what it does not like is a convention of Prometheus that OpenTelemetry's exporter does not follow
    assert [line for line in checked.stderr.splitlines() if "target_info" not in line] == []


PROCESS = """
import sys
from prometheus_client import CollectorRegistry, start_http_server
import runpy
emit_everything = runpy.run_path({folder!r} + "/test_prometheus.py")["emit_everything"]
registry = CollectorRegistry()
profiling = emit_everything(registry)
server, _ = start_http_server(0, "127.0.0.1", registry)
print(server.server_port, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that scrapes a vgen process."""
    code = PROCESS.format(folder=str(Path(__file__).parent))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as vgen:
        assert vgen.stdout is not None
        assert vgen.stdin is not None
        target = f"127.0.0.1:{int(vgen.stdout.readline())}"
        try:
            with scraping(tmp_path_factory.mktemp("prometheus"), vgen=target) as address:
                yield address
        finally:
            vgen.stdin.close()


@needs_prometheus
def test_a_real_prometheus_has_every_metric(prometheus: str):
    assert float(wait_for(prometheus, "up == 1")[0]["value"][1]) == 1
    for metric in EVERY_METRIC:
        name = prometheus_name(metric) + ("_count" if metric.kind == "histogram" else "")
        for series in wait_for(prometheus, name):
            assert set(series["metric"]) - {"__name__", "instance", "job"} <= {
                re.sub(r"\W", "_", label) for label in metric.attributes
            }


@needs_prometheus
def test_a_real_prometheus_answers_what_dashboards_ask(prometheus: str):
    tokens = wait_for(prometheus, 'sum(vgen_generate_output_tokens_total{vgen_engine_kind="colocate"})')
    assert float(tokens[0]["value"][1]) == 3
    p90 = wait_for(prometheus, "histogram_quantile(0.9, sum by (le) (vgen_request_e2e_seconds_bucket))")
    assert 2.5 < float(p90[0]["value"][1]) <= 5
    ranked = "vgen_engine_age_seconds * on (instance) group_left (vgen_rank) target_info"
    assert wait_for(prometheus, ranked)[0]["metric"]["vgen_rank"] == "2"
    assert wait_for(prometheus, "scrape_samples_scraped")[0]["value"][1] != "0"
