"""One call: what it checks, what it records, and how it ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.sources import SmallSource

from vgen import (
    EngineError,
    EngineStateError,
    Generation,
    ProfilingContext,
    RequestTracing,
    Sampling,
)
from vgen.engine_protocol import EngineState
from vgen.profiling import semconv
from vgen.weights import source_of


@pytest.mark.fault(
    point="a call of `generate`",
    did="The engine breaks in a call",
    happens="`EngineError`; the state is `failed`",
    within=20,
)
def test_an_engine_that_breaks_while_generating_is_failed(generation, engine):
    engine.raises["stream"] = EngineError("gone")
    with pytest.raises(EngineError):
        generation.generate([[1]])
    assert generation.state is EngineState.FAILED


def test_a_refused_parameter_is_not_the_engines_fault(generation, engine):
    engine.raises["stream"] = ValueError("bad parameter")
    with pytest.raises(ValueError, match="bad parameter"):
        generation.generate([[1]])
    assert generation.state is EngineState.AWAKE


def test_no_prompts_at_all(generation):
    assert len(generation.generate([])) == 0
    assert len(generation.generate([[]], refused="mark")) == 1


def test_num_generations_and_level_are_checked(generation):
    with pytest.raises(ValueError, match="num_generations"):
        generation.generate([[1]], num_generations=0)
    with pytest.raises(ValueError, match="level"):
        generation.sleep(3)


def test_only_the_slowest_requests_become_spans_and_all_are_counted(engine, sink):
    profiling = ProfilingContext([sink])
    generation = Generation(
        engine, SmallSource(), profiling=profiling, request_tracing=RequestTracing(request_spans=3, traced_requests=0)
    )
    with profiling.step(1) as row:
        generation.generate([[1, 2]] * 10, Sampling(max_tokens=2))
    assert len(sink.named(semconv.REQUEST)) == 3
    assert row.summary()["vgen.request.e2e.count"] == 10
    assert "vgen.request.duration.count" not in row.summary()  # three of ten are no distribution
    assert row.summary()["vgen.generate.output_tokens"] == 20


def test_nothing_recorded_holds_a_prompt_or_a_completion(engine, sink):
    generation = Generation(engine, SmallSource(), profiling=ProfilingContext([sink]))
    generation.generate([[41, 42, 43]], Sampling(max_tokens=3))
    for span in sink.spans:
        for value in span.attributes.values():
            assert value not in ([41, 42, 43], (41, 42, 43), 41, 42, 43)


def test_a_stream_yields_each_completion_and_leaves_its_span(generation, engine, sink):
    found = list(generation.stream([[1], [], [3, 4]], num_generations=2, refused="mark"))
    assert sorted((c.prompt_index, c.generation_index) for c in found) == [(p, g) for p in range(3) for g in range(2)]
    assert [c.error is not None for c in found[:2]] == [True, True]
    (span,) = sink.named(semconv.GENERATE)
    assert span.attributes[semconv.COMPLETIONS] == 4
    assert semconv.REBUILT not in span.attributes


def test_no_span_is_open_while_the_caller_has_a_streams_completion_in_hand(engine):
    profiling = ProfilingContext()
    generation = Generation(engine, SmallSource(), profiling=profiling)
    with profiling.span("mine") as mine:
        for _ in generation.stream([[1], [2]]):
            assert profiling.current_span() is mine


def test_while_a_stream_is_open_its_thread_is_refused_and_closing_it_frees_the_engine(generation):
    stream = generation.stream([[1], [2]])
    next(stream)
    for call in (lambda: generation.generate([[1]]), generation.sync_weights, lambda: list(generation.stream([[1]]))):
        with pytest.raises(EngineStateError):
            call()
    stream.close()
    assert len(generation.generate([[1]])) == 1


@pytest.mark.fault(
    point="a call of `generate`",
    did="The engine breaks in a stream",
    happens="The stream raises, and its span is red",
    within=20,
)
def test_a_stream_that_breaks_fails_the_engine_and_its_span(generation, engine, sink):
    engine.raises["stream"] = EngineError("gone")
    with pytest.raises(EngineError):
        list(generation.stream([[1]]))
    assert generation.state is EngineState.FAILED
    assert sink.named(semconv.GENERATE)[0].error == "EngineError"


@pytest.mark.parametrize(("asked", "traced"), [(0, 0), (2, 2), (99, 20), (lambda step: 3 if step == 1 else 0, 3)])
def test_random_requests_are_traced_from_their_dispatch_and_the_engine_is_told_of_no_other(engine, sink, asked, traced):
    profiling = ProfilingContext([sink])
    generation = Generation(
        engine,
        SmallSource(),
        profiling=profiling,
        request_tracing=RequestTracing(request_spans=0, traced_requests=asked),
    )
    with profiling.step(1):
        generation.generate([[1, 2]] * 10, Sampling(max_tokens=2), 2)
    (engine_span,) = sink.named(semconv.ENGINE_GENERATE)
    requests = sink.named(semconv.REQUEST)
    sent = [request.headers["traceparent"] for request in engine.requests]
    assert sorted(parent for parent in sent if parent.endswith("-01")) == sorted(
        f"00-{span.trace_id}-{span.span_id}-01" for span in requests
    )
    assert len(requests) == traced
    assert {parent for parent in sent if parent.endswith("-00")} <= {
        f"00-{engine_span.trace_id}-{engine_span.span_id}-00"
    }
    for span in requests:
        assert span.parent is engine_span
        assert span.attributes[semconv.OUTPUT_TOKENS] == 2
        assert engine_span.start_ns <= span.start_ns <= span.end_ns <= engine_span.end_ns
    assert (
        len({(s.attributes[semconv.PROMPT_INDEX], s.attributes[semconv.GENERATION_INDEX]) for s in requests}) == traced
    )


@pytest.mark.fault(
    point="a call of `generate`",
    did="The engine loses a traced request",
    happens="Its span ends with the error",
    within=20,
)
def test_a_traced_request_that_the_engine_loses_ends_with_the_error(engine, sink):
    generation = Generation(engine, SmallSource(), profiling=ProfilingContext([sink]))
    engine.raises["stream"] = EngineError("gone")
    with pytest.raises(EngineError):
        generation.generate([[1]])
    (request,) = sink.named(semconv.REQUEST)
    assert request.error == "EngineError"


@pytest.mark.parametrize(("eos", "stops"), [(7, (5, 7)), ([56, 7, 256], (5, 56, 7)), (None, (5,))])
def test_a_completion_ends_at_each_end_of_sequence_token_of_the_live_model(engine, eos, stops):
    model = torch.nn.Linear(1, 1)
    model.generation_config = SimpleNamespace(eos_token_id=None)  # pyright: ignore[reportAttributeAccessIssue]
    asked: list[tuple[int, ...]] = []
    stream = engine.stream

    def noted(batch):
        asked.append(tuple(batch.sampling.stop_token_ids))
        return stream(batch)

    engine.stream = noted
    generation = Generation(engine, source_of(model))
    model.generation_config.eos_token_id = eos  # pyright: ignore[reportAttributeAccessIssue]
    for ignore in (False, True):
        generation.generate([[1]], Sampling(stop_token_ids=[5], ignore_eos=ignore))
    assert asked == [stops, (5,)]
