"""The tracer provider: IDs that do not collide, and a count of what was lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from helpers.collectors import HttpCollector
from helpers.otel_tracing import DEADLINE, exporting, loop
from helpers.waiting import wait_until

from vgen.profiling import semconv
from vgen.profiling.sinks.otel_sdk import otlp_providers
from vgen.profiling.sinks.otel_tracers import RandomIds

pytestmark = pytest.mark.usefixtures("fast_export")


def test_ranks_that_seed_alike_have_different_ids(monkeypatch: Any):
    def ids(draw: Callable[[], RandomIds]) -> list[int]:
        random.seed(0)
        generator = draw()
        return [generator.generate_trace_id(), generator.generate_span_id()]

    assert not set(ids(RandomIds)) & set(ids(RandomIds))
    assert all(0 < found < 2**128 for found in ids(RandomIds))
    assert RandomIds().generate_span_id() < 2**64
    state = random.getstate()
    RandomIds().generate_trace_id()
    assert random.getstate() == state


def test_the_providers_use_such_ids(monkeypatch: Any):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    found: list[int] = []
    for rank in range(2):
        random.seed(0)
        with otlp_providers(rank=rank) as providers:
            context = providers.tracer_provider.get_tracer("rank").start_span("x").get_span_context()
            found += [context.trace_id, context.span_id]
    assert len(set(found)) == 4


def test_what_arrived_before_a_death_half_way_is_not_counted_as_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    collector = HttpCollector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    providers, profiling = exporting()
    loop(profiling, 3)
    assert profiling.flush(5)
    arrived = len(collector.spans)
    collector.close()
    loop(profiling, 2)
    assert not providers.close(DEADLINE)
    assert arrived == 33
    assert providers.lost == 22


def test_spans_that_failed_show_up_in_the_contexts_own_count(monkeypatch: pytest.MonkeyPatch):
    collector = HttpCollector(status=400)  # which nobody repeats
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    providers, profiling = exporting()
    loop(profiling, 1)
    wait_until(lambda: providers.lost >= 11)
    assert profiling.dropped() == {"OTelSink": 11}
    with profiling.step(9) as row:
        pass
    assert row.summary()[semconv.DROPPED.name] == 11
    providers.close()
    collector.close()


def test_what_a_full_queue_refuses_is_counted_at_once_and_logged_by_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    collector = HttpCollector(hang=True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "100")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "50")
    providers, profiling = exporting()
    loop(profiling, 30)
    assert profiling.dropped() == {"OTelSink": 230}
    with profiling.step(30):
        pass
    assert profiling.summary()[semconv.DROPPED.name] == 230
    assert not providers.close(DEADLINE)
    assert providers.lost == 331
    assert "Queue full" not in caplog.text
    collector.close()
