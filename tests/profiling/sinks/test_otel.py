"""Spans through OpenTelemetry: one tree and one id space with the caller's own, on every thread and task."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.files import python_output
from helpers.otel_tracing import Traced, current_name
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.otel import OTelSink
from vgen.testing import MemorySink

pytestmark = pytest.mark.usefixtures("nothing_is_left_current")


def test_the_callers_spans_are_parents_and_children_of_vgens(traced: Traced):
    with traced.tracer.start_as_current_span("caller's outer"):
        with traced.profiling.step(1):
            with traced.tracer.start_as_current_span("caller's inner"):
                with traced.profiling.span("vgen's inner"):
                    assert current_name() == "vgen's inner"
                assert current_name() == "caller's inner"
            assert current_name() == semconv.STEP
        assert current_name() == "caller's outer"
    assert traced.parents() == {
        "caller's outer": None,
        semconv.STEP: "caller's outer",
        "caller's inner": semconv.STEP,
        "vgen's inner": "caller's inner",
    }
    assert len({span.context.trace_id for span in traced.spans().values()}) == 1


def test_all_sinks_record_opentelemetrys_ids(traced: Traced):
    with traced.tracer.start_as_current_span("caller's"), traced.profiling.span("a"), traced.profiling.span("b"):
        pass
    exported = traced.spans()
    for kept in traced.memory.spans:
        theirs = exported[kept.name]
        assert theirs.parent is not None
        assert kept.trace_id == trace.format_trace_id(theirs.context.trace_id)
        assert kept.span_id == trace.format_span_id(theirs.context.span_id)
        assert kept.parent_id == trace.format_span_id(theirs.parent.span_id)
        assert kept.start_unix_ns == theirs.start_time
        assert kept.end_unix_ns == theirs.end_time


def test_http_headers_carry_the_open_span(traced: Traced):
    with traced.profiling.span("request") as span:
        headers: dict[str, str] = {}
        propagate.inject(headers)
    assert headers["traceparent"][:55].startswith(f"00-{span.trace_id}-{span.span_id}-")
    assert int(headers["traceparent"][-2:], 16) & trace.TraceFlags.SAMPLED


def test_an_exception_leaves_its_type_and_never_its_message(traced: Traced):
    with pytest.raises(ValueError, match="secret"), traced.profiling.span("failing"):
        raise ValueError("the secret prompt")
    span = traced.spans()["failing"]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description == "ValueError"
    assert span.attributes == {semconv.ERROR_TYPE: "ValueError"}
    (event,) = span.events
    assert (event.name, event.attributes) == (semconv.EXCEPTION_EVENT, {semconv.EXCEPTION: "ValueError"})
    assert "secret" not in span.to_json()


def test_attributes_events_and_links_that_come_while_it_is_open(traced: Traced):
    with traced.profiling.span("sync") as sync:
        pass
    with traced.profiling.span("generate", prompts=2, kept=1) as span:
        span.set(prompts=3, tokens=[1, 2]).event("first token", batch=1).link(sync, why="weights")
    exported = traced.spans()["generate"]
    assert exported.attributes == {"prompts": 3, "kept": 1, "tokens": (1, 2)}
    assert [(event.name, event.attributes) for event in exported.events] == [("first token", {"batch": 1})]
    assert exported.start_time < exported.events[0].timestamp < exported.end_time
    (link,) = exported.links
    assert link.context.span_id == int(sync.span_id, 16)
    assert link.attributes == {"why": "weights"}


def test_a_link_that_a_span_opens_with_is_exported_once_beside_those_that_come_later(traced: Traced):
    with traced.profiling.step(1) as first, traced.profiling.span("sync") as sync:
        pass
    with traced.profiling.step(2) as second:
        second.link(sync)
    links = traced.spans()[semconv.STEP].links  # the second step's
    assert [trace.format_span_id(link.context.span_id) for link in links] == [first.span_id, sync.span_id]


def test_each_step_is_a_trace_that_points_at_the_one_before(traced: Traced):
    for number in range(2):
        with traced.profiling.step(number), traced.profiling.span("work"):
            pass
    first, second = [span for span in traced.exporter.get_finished_spans() if span.name == semconv.STEP]
    assert first.context.trace_id != second.context.trace_id
    assert [link.context for link in first.links] == []
    assert [link.context.span_id for link in second.links] == [first.context.span_id]


def test_spans_rebuilt_afterwards_lie_beneath_a_parent_that_has_ended(traced: Traced):
    with traced.profiling.span("engine") as engine:
        pass
    traced.profiling.rebuilt("request", engine.start_ns, engine.start_ns + 1000, {"n": 1}, parent=engine, error="Boom")
    request = traced.spans()["request"]
    assert traced.parents()["request"] == "engine"
    assert not request.parent.is_remote
    assert request.end_time - request.start_time == 1000
    assert request.attributes == {"n": 1, semconv.REBUILT: True, semconv.ERROR_TYPE: "Boom"}


def test_a_trace_that_is_sampled_out_keeps_its_ids_and_says_so_to_servers():
    traced = Traced(sampler=ParentBased(ALWAYS_OFF))
    with traced.profiling.step(1) as step:
        headers: dict[str, str] = {}
        propagate.inject(headers)
        with traced.profiling.span("engine") as engine:
            pass
        traced.profiling.rebuilt("request", engine.start_ns, engine.start_ns + 1, parent=engine)
        assert headers["traceparent"][3:52] == f"{step.trace_id}-{step.span_id}"
        assert not int(headers["traceparent"][-2:], 16) & trace.TraceFlags.SAMPLED
    assert not traced.exporter.get_finished_spans()
    kept = {span.name: span for span in traced.memory.spans}
    assert not any(span.sampled for span in kept.values())
    assert kept["request"].parent_id == kept["engine"].span_id
    assert kept["engine"].parent_id == step.span_id
    assert len({span.span_id for span in kept.values()}) == 3
    assert {span.trace_id for span in kept.values()} == {step.trace_id}


def test_without_an_sdk_vgens_own_ids_stay():
    memory = MemorySink()
    profiling = ProfilingContext([OTelSink(trace.NoOpTracerProvider()), memory])
    with profiling.span("outer") as outer, profiling.span("inner") as inner:
        assert inner.trace_id == outer.trace_id
        assert inner.parent_id == outer.span_id
    assert len({outer.span_id, inner.span_id}) == 2
    assert int(outer.trace_id, 16)
    assert len(memory.spans) == 2


def test_what_another_process_began_goes_on_here(traced: Traced):
    with traced.profiling.step(1) as step:
        carrier = traced.profiling.carrier()
    beneath = ProfilingContext([OTelSink(traced.provider)], parent=carrier)
    with beneath.span("worker") as worker:
        assert (worker.trace_id, worker.parent_id) == (step.trace_id, step.span_id)
        with beneath.span("inner"):
            pass
    assert traced.parents() == {semconv.STEP: None, "worker": semconv.STEP, "inner": "worker"}
    assert traced.spans()["worker"].parent.is_remote
    assert not traced.spans()["inner"].parent.is_remote


def test_what_another_process_sampled_out_stays_out():
    traced = Traced()
    carrier = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-00"}
    beneath = ProfilingContext([OTelSink(traced.provider)], parent=carrier)
    with beneath.span("worker") as worker:
        assert beneath.carrier() == {"traceparent": f"00-{'1' * 32}-{worker.span_id}-00"}
    assert not traced.spans()


def test_two_contexts_with_providers_of_their_own_live_side_by_side():
    one, two = Traced(), Traced()
    for traced in (one, two):
        with traced.profiling.span("outer"), traced.profiling.span("inner"):
            pass
    with one.profiling.span("one's"), two.profiling.span("two's") as inner:
        pass
    assert set(one.spans()) == {"outer", "inner", "one's"}
    assert set(two.spans()) == {"outer", "inner", "two's"}
    # the context of OpenTelemetry is one for the whole process: what is open in it is the parent, whoever exports it
    assert inner.parent_id == trace.format_span_id(one.spans()["one's"].context.span_id)


def test_a_broken_tracer_breaks_no_work(caplog: Any):
    class Broken(TracerProvider):
        def get_tracer(self, *_: Any, **__: Any) -> Any:
            class Tracer:
                def start_span(self, *_: Any, **__: Any) -> Any:
                    raise RuntimeError("no tracing today")

            return Tracer()

    memory = MemorySink()
    profiling = ProfilingContext([OTelSink(Broken(shutdown_on_exit=False)), memory])
    with profiling.span("outer"), profiling.span("inner"):
        pass
    assert [span.name for span in memory.spans] == ["inner", "outer"]
    assert memory.spans[0].parent_id == memory.spans[1].span_id


def test_generation_is_what_the_genai_view_of_a_viewer_looks_for(traced: Traced):
    with traced.profiling.span(semconv.GENERATE), traced.profiling.span(semconv.ENGINE_GENERATE):
        pass
    assert traced.spans()[semconv.GENERATE].attributes == {
        semconv.OPERATION: "text_completion",
        semconv.PROVIDER: "vllm",
    }
    assert traced.spans()[semconv.ENGINE_GENERATE].attributes == {}
    assert traced.spans()[semconv.GENERATE].instrumentation_scope.schema_url in (None, "")


def test_names_for_reinforcement_learning_are_there_for_who_asks():
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    memory = MemorySink()
    profiling = ProfilingContext([OTelSink(provider, conventions=(semconv.RL_EXPERIMENTAL,)), memory])
    with profiling.step(1):
        for name in (semconv.GENERATE, "reward", "update", semconv.WEIGHT_SYNC, "mine"):
            with profiling.span(name):
                pass
    exported = [span.name for span in exporter.get_finished_spans()]
    assert exported == ["rl.sample", "rl.reward", "rl.train", "rl.sync", "mine", "rl.loop"]
    assert memory.named(semconv.GENERATE)


def test_no_global_provider_is_set_and_the_sdk_is_not_loaded():
    code = """
import sys
from opentelemetry import metrics, trace
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.otel import OTelSink
with ProfilingContext([OTelSink()]) as profiling, profiling.step(1), profiling.span("work"):
    pass
assert not any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in sys.modules)
from vgen.profiling.sinks.otel_sdk import otlp_providers
with otlp_providers() as made, ProfilingContext([OTelSink(made.tracer_provider, made.meter_provider)]) as profiling:
    pass
print(type(trace.get_tracer_provider()).__name__, type(metrics.get_meter_provider()).__name__)
"""
    assert python_output(code).split() == ["ProxyTracerProvider", "_ProxyMeterProvider"]


def test_the_global_providers_are_the_default_also_when_they_are_set_later():
    code = """
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.otel import OTelSink
profiling = ProfilingContext([OTelSink()])
with profiling.step(0): pass
exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
provider = TracerProvider(); provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))
for number in (1, 2):
    with profiling.step(number): profiling.record(semconv.GENERATED_TOKENS, 5)
print(len(exporter.get_finished_spans()))
scopes = reader.get_metrics_data().resource_metrics[0].scope_metrics
print(*sorted(metric.name for scope in scopes for metric in scope.metrics))
"""
    assert python_output(code).split() == ["2", "train.step.duration", "vgen.generate.output_tokens"]
