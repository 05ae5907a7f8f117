"""Measurements through OpenTelemetry: buckets that suit the unit, few labels, GenAI's names where they are due."""

from __future__ import annotations

import logging
import math
import threading
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from vgen.profiling import Instrument, ProfilingContext, semconv
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.otel_metrics import MAX_USER_SPANS


class Metered:
    def __init__(self, tracer_provider: Any = None, **sink: Any) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
        self.sink = OTelSink(tracer_provider, self.provider, **sink)
        self.profiling = ProfilingContext([self.sink])

    def read(self) -> dict[str, list[Any]]:
        """The data points of each metric."""
        return {name: list(metric.data.data_points) for name, metric in self.metrics().items()}

    def metrics(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        resources = data.resource_metrics if data is not None else []
        found = [m for resource in resources for scope in resource.scope_metrics for m in scope.metrics]
        assert len({metric.name for metric in found}) == len(found), "one metric for each name"
        return {metric.name: metric for metric in found}


@pytest.fixture
def metered() -> Metered:
    return Metered()


def test_each_kind_keeps_name_unit_and_value(metered: Metered):
    profiling = metered.profiling.bind({semconv.ENGINE: "server"})
    for value in (3, 4):
        profiling.record(semconv.GENERATED_TOKENS, value)
        profiling.record(semconv.THROUGHPUT, value)
    profiling.record_many(semconv.REQUEST_E2E, [0.5, 1.5])
    found = metered.metrics()
    for instrument in (semconv.GENERATED_TOKENS, semconv.THROUGHPUT, semconv.REQUEST_E2E):
        assert found[instrument.name].unit == instrument.unit
        assert found[instrument.name].description == instrument.description
    points = metered.read()
    assert points[semconv.GENERATED_TOKENS.name][0].value == 7
    assert points[semconv.THROUGHPUT.name][0].value == 4
    assert (points[semconv.REQUEST_E2E.name][0].count, points[semconv.REQUEST_E2E.name][0].sum) == (2, 2.0)


@pytest.mark.parametrize(
    ("unit", "bounds"),
    [("s", semconv.SECONDS), ("By", semconv.BYTES), ("{token}", semconv.COUNTS), ("1", semconv.COUNTS)],
)
def test_buckets_suit_the_unit(metered: Metered, unit: str, bounds: tuple[float, ...]):
    metered.profiling.record(Instrument("mine", "histogram", unit), 1.0)
    assert metered.read()["mine"][0].explicit_bounds == bounds


def test_an_instrument_may_name_its_own_buckets(metered: Metered):
    metered.profiling.record(Instrument("mine", "histogram", "s", boundaries=(1.0, 2.0)), 1.5)
    (point,) = metered.read()["mine"]
    assert (point.explicit_bounds, list(point.bucket_counts)) == ((1.0, 2.0), [0, 1, 0])


def test_only_the_instruments_own_attributes_become_labels(metered: Metered):
    profiling = metered.profiling.bind({semconv.ENGINE: "colocate", semconv.RANK: 3})
    with profiling.step(17), profiling.span(semconv.GENERATE, {semconv.REQUEST_ID: "vgen-1"}):
        profiling.record(semconv.GENERATED_TOKENS, 1, prompt=9)
    for points in metered.read().values():
        for point in points:
            assert not set(point.attributes) & {semconv.STEP_NUMBER, semconv.RANK, semconv.REQUEST_ID, "prompt"}
    assert metered.read()[semconv.GENERATED_TOKENS.name][0].attributes == {semconv.ENGINE: "colocate"}


def test_each_spans_seconds_are_a_histogram(metered: Metered):
    profiling = metered.profiling.bind({semconv.ENGINE: "colocate"})
    with profiling.step(1), profiling.span(semconv.SLEEP, {semconv.SLEEP_LEVEL: 2}), profiling.span("reward"):
        pass
    with pytest.raises(KeyError), profiling.span("update"):
        raise KeyError("prompt")
    points = metered.read()
    (sleep,) = points["vgen.sleep.duration"]
    assert sleep.attributes == {semconv.ENGINE: "colocate", semconv.SLEEP_LEVEL: 2}
    assert sleep.explicit_bounds == semconv.SECONDS
    assert points["reward.duration"][0].attributes == {}
    assert points["update.duration"][0].attributes == {semconv.ERROR_TYPE: "KeyError"}
    assert points["train.step.duration"][0].count == 1


def test_spans_that_are_a_selection_make_no_histogram(metered: Metered):
    with metered.profiling.span("engine") as engine, metered.profiling.span(semconv.REQUEST):
        pass
    metered.profiling.rebuilt(semconv.REQUEST, engine.start_ns, engine.start_ns + 1)
    metered.profiling.rebuilt("rebuilt", engine.start_ns, engine.start_ns + 1)
    assert set(metered.read()) == {"engine.duration"}


def test_span_names_without_end_do_not_make_metrics_without_end(metered: Metered):
    for number in range(3 * MAX_USER_SPANS):
        with metered.profiling.span(f"rollout {number}"), metered.profiling.span(f"rollout-{number}"):
            pass
    with metered.profiling.span(semconv.GENERATE):
        pass
    found = set(metered.read())
    assert "vgen.generate.duration" in found
    assert len(found) <= MAX_USER_SPANS + 1


def test_observed_gauges_are_read_when_they_are_collected(metered: Metered):
    state = Instrument("vgen.engine.age", "gauge", "s", "Seconds in the state.", (semconv.ENGINE,))
    ages = iter([1.0, 2.0])
    metered.profiling.bind({semconv.ENGINE: "ray", semconv.RANK: 1}).observe(state, lambda: next(ages))
    assert [(p.value, p.attributes) for p in metered.read()[state.name]] == [(1.0, {semconv.ENGINE: "ray"})]
    assert metered.read()[state.name][0].value == 2.0


def test_a_gauge_that_is_also_read_at_a_steps_end_is_one_metric(metered: Metered):
    state = Instrument("depth", "gauge")
    metered.profiling.observe(state, lambda: 5.0)
    with metered.profiling.step(1):
        pass
    assert [point.value for point in metered.read()["depth"]] == [5.0]


def test_a_gauge_goes_with_what_it_tells_of(metered: Metered):
    class Engine:
        def depth(self) -> float:
            return 3.0

    engine, other = Engine(), Engine()
    metered.profiling.bind(which="a").observe(Instrument("depth", "gauge", attributes=("which",)), engine.depth)
    metered.profiling.bind(which="b").observe(Instrument("depth", "gauge", attributes=("which",)), other.depth)
    with metered.profiling.step(1):
        pass
    assert [point.attributes for point in metered.read()["depth"]] == [{"which": "a"}, {"which": "b"}]
    del engine
    assert [point.attributes for point in metered.read()["depth"]] == [{"which": "b"}]
    metered.profiling.close()
    metered.read()  # what closing has collected, for the last time
    assert "depth" not in metered.read()


def test_a_gauge_keeps_its_last_value_until_there_is_another(metered: Metered):
    for engine, value in (("ray", 1.0), ("server", 2.0), ("ray", 3.0)):
        metered.profiling.bind({semconv.ENGINE: engine}).record(semconv.THROUGHPUT, value)
    for _ in range(3):  # a Prometheus that scrapes more often than it is set must not see it come and go
        points = metered.read()[semconv.THROUGHPUT.name]
        assert {point.attributes[semconv.ENGINE]: point.value for point in points} == {"ray": 3.0, "server": 2.0}


def test_a_gauges_failing_callback_hides_no_other(metered: Metered, caplog: Any):
    def broken() -> float:
        raise OSError("http://user:password@host")

    metered.profiling.bind(which="a").observe(Instrument("depth", "gauge", attributes=("which",)), broken)
    metered.profiling.bind(which="b").observe(Instrument("depth", "gauge", attributes=("which",)), lambda: 1.0)
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert [point.attributes for point in metered.read()["depth"]] == [{"which": "b"}]
    assert len(caplog.records) == 1
    assert "password" not in caplog.text


def test_two_sinks_on_one_provider_both_observe():
    metered = Metered()
    other = ProfilingContext([OTelSink(meter_provider=metered.provider)])
    depth = Instrument("depth", "gauge", attributes=("which",))
    metered.profiling.bind(which="a").observe(depth, lambda: 1.0)
    other.bind(which="b").observe(depth, lambda: 2.0)
    data = metered.reader.get_metrics_data()
    assert data is not None
    scopes = data.resource_metrics[0].scope_metrics
    values = {p.attributes["which"]: p.value for s in scopes for m in s.metrics for p in m.data.data_points}
    assert values == {"a": 1.0, "b": 2.0}


REQUEST_METRICS = (
    semconv.REQUEST_E2E,
    semconv.REQUEST_TTFT,
    semconv.REQUEST_TPOT,
    semconv.COMPLETION_LENGTH,
    semconv.PROMPT_LENGTH,
)


def genai(engine: str | None, **sink: Any) -> dict[str, list[Any]]:
    metered = Metered(**sink)
    profiling = metered.profiling.bind({semconv.ENGINE: engine, semconv.MODEL: "tiny"})
    for instrument in REQUEST_METRICS:
        profiling.record_many(instrument, [0.5, 3.0])
    profiling.record(semconv.PROMPT_TOKENS, 70)
    profiling.record(semconv.GENERATED_TOKENS, 30)
    return {name: points for name, points in metered.read().items() if name.startswith("gen_ai.")}


def test_where_vgen_runs_the_engine_it_is_a_genai_server():
    found = genai("colocate")
    assert set(found) == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }
    (point,) = found["gen_ai.server.time_to_first_token"]
    assert point.attributes == {semconv.OPERATION: "text_completion", semconv.PROVIDER: "vllm", semconv.MODEL: "tiny"}
    # https://github.com/open-telemetry/semantic-conventions-genai, docs/gen-ai/gen-ai-metrics.md
    assert point.explicit_bounds == (
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0
    )  # fmt: skip
    assert (point.count, point.sum) == (2, 3.5)


def test_a_client_is_never_a_genai_server():
    found = genai("server")
    assert set(found) == {
        "gen_ai.client.operation.duration",
        "gen_ai.client.operation.time_to_first_chunk",
        "gen_ai.client.token.usage",
    }
    usage = found["gen_ai.client.token.usage"]
    assert {point.attributes[semconv.TOKEN_TYPE] for point in usage} == {"input", "output"}
    assert usage[0].explicit_bounds[:4] == (1, 4, 16, 64)
    assert usage[0].explicit_bounds[-1] == 67108864


COMMON_LABELS = {semconv.OPERATION: "text_completion", semconv.PROVIDER: "vllm", semconv.MODEL: "tiny"}


def test_the_newer_convention_has_names_of_its_own_for_clients():
    """https://github.com/open-telemetry/semantic-conventions-genai/blob/v0.1.0/docs/gen-ai/client-inference.md"""
    points = genai("server", conventions=(semconv.GEN_AI_INFERENCE,))
    histograms = {name: each[0] for name, each in points.items() if ".usage." not in name}
    assert {name: (point.count, point.sum, point.attributes) for name, point in histograms.items()} == {
        "gen_ai.client.inference.duration": (2, 3.5, COMMON_LABELS),
        "gen_ai.client.inference.time_to_first_chunk": (2, 3.5, COMMON_LABELS),
        "gen_ai.client.inference.operation.input_tokens": (2, 3.5, COMMON_LABELS),
        "gen_ai.client.inference.operation.output_tokens": (2, 3.5, COMMON_LABELS),
    }
    assert histograms["gen_ai.client.inference.duration"].explicit_bounds[-1] == 81.92
    assert histograms["gen_ai.client.inference.operation.input_tokens"].explicit_bounds[-1] == 67108864
    counters = {name: each[0] for name, each in points.items() if ".usage." in name}
    assert {name: (point.value, point.attributes) for name, point in counters.items()} == {
        "gen_ai.client.inference.usage.input_tokens": (70, {**COMMON_LABELS, semconv.TOKEN_MODALITY: "unknown"}),
        "gen_ai.client.inference.usage.output_tokens": (30, {**COMMON_LABELS, semconv.TOKEN_MODALITY: "text"}),
    }


def test_both_conventions_have_the_same_names_for_servers():
    assert genai("colocate").keys() == genai("colocate", conventions=(semconv.GEN_AI_INFERENCE,)).keys()


@pytest.mark.parametrize("engine", ["colocate", "server"])
def test_with_both_conventions_no_value_is_counted_twice(engine: str):
    both = (semconv.GEN_AI, semconv.GEN_AI_INFERENCE)
    points = genai(engine, conventions=both)
    assert points.keys() == {name for each in both for name in genai(engine, conventions=(each,))}
    assert {point.count for each in points.values() for point in each if hasattr(point, "count")} == {2}


def test_without_an_engine_or_the_convention_there_is_neither():
    assert genai(None) == {}
    assert genai("colocate", conventions=()) == {}


def test_reinforcement_learnings_durations_have_its_names():
    metered = Metered(conventions=(semconv.RL_EXPERIMENTAL,))
    with metered.profiling.step(1), metered.profiling.span(semconv.GENERATE):
        pass
    assert set(metered.read()) == {"rl.loop.duration", "rl.sample.duration"}


def test_values_that_opentelemetry_cannot_hold_are_counted_and_said_once(metered: Metered, caplog: Any):
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            metered.profiling.record_many(semconv.REQUEST_E2E, [math.nan, math.inf, -1.0, 2.0])
            metered.profiling.record_many(semconv.GENERATED_TOKENS, [math.nan, -5, 2])
    points = metered.read()
    assert (points[semconv.REQUEST_E2E.name][0].count, points[semconv.REQUEST_E2E.name][0].sum) == (3, 6.0)
    assert points[semconv.GENERATED_TOKENS.name][0].value == 6
    assert len(caplog.records) == 2
    metered.profiling.record_many(semconv.THROUGHPUT, [-1.0, math.inf])
    assert metered.read()[semconv.THROUGHPUT.name][0].value == -1.0
    assert metered.sink.lost == 16


def test_histograms_point_at_the_traces_behind_them():
    metered = Metered(TracerProvider(shutdown_on_exit=False))
    with metered.profiling.span(semconv.GENERATE) as span:
        metered.profiling.record(semconv.REQUEST_E2E, 0.7)
    points = metered.read()
    for name in (semconv.REQUEST_E2E.name, "vgen.generate.duration"):
        (exemplar,) = points[name][0].exemplars
        assert (exemplar.trace_id, exemplar.span_id) == (int(span.trace_id, 16), int(span.span_id, 16))


def test_a_span_that_ends_elsewhere_is_still_its_own_example():
    metered = Metered(TracerProvider(shutdown_on_exit=False))
    held = metered.profiling.span("held")

    def begin() -> None:
        span.append(held.__enter__())

    span: list[Any] = []
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    with metered.profiling.span("another"):
        held.__exit__(None, None, None)
    assert metered.read()["held.duration"][0].exemplars[0].span_id == int(span[0].span_id, 16)


def test_metrics_count_what_is_sampled_out_of_the_traces():
    metered = Metered(TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False))
    with metered.profiling.span(semconv.GENERATE):
        metered.profiling.record(semconv.REQUEST_E2E, 0.7)
    points = metered.read()
    assert points["vgen.generate.duration"][0].count == points[semconv.REQUEST_E2E.name][0].count == 1
    assert not points[semconv.REQUEST_E2E.name][0].exemplars


def test_a_detached_spans_seconds_count_and_those_of_a_rebuilt_one_do_not(metered: Metered):
    detached = metered.profiling.detached("waiting")
    metered.profiling.finish(detached)
    metered.profiling.rebuilt("waiting", detached.start_ns, detached.start_ns + 1)
    assert metered.read()["waiting.duration"][0].count == 1
