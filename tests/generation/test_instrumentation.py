"""What one call adds to the telemetry: exact counts, every request measured, and spans for the slowest."""

from __future__ import annotations

from dataclasses import replace

from vgen import Completion, Completions, ProfilingContext, PromptError, RequestTiming
from vgen.generation.instrumentation import counts, measure, request_attributes
from vgen.profiling import ContentCapture, semconv
from vgen.testing import MemorySink

PROMPTS = [[1, 2, 3], [4], [5, 6]]


def timing(e2e: float, arrived: float = 0.0) -> RequestTiming:
    return RequestTiming(
        queued_ns=int(arrived * 1e9),
        finished_ns=int((arrived + e2e) * 1e9),
        admission=0.0,
        queue=0.25,
        prefill=0.25,
        decode=e2e - 0.5,
        time_to_first_token=0.5,
        time_per_output_token=None,
        e2e=e2e,
        preemptions=1,
        cached_tokens=2,
    )


def done(prompt: int, tokens: int, e2e: float, reason: str = "stop", server: str | None = None) -> Completion:
    return Completion(
        prompt_index=prompt,
        generation_index=0,
        token_ids=[7] * tokens,
        finish_reason=reason,
        timing=timing(e2e, arrived=10.0 + prompt),
        request_id=f"r{prompt}",
        server=server,
    )


def result(*completions: Completion) -> Completions:
    return Completions(PROMPTS, list(completions), 1, "v1")


def recorded(completions: Completions, slowest: int = 0, traced=()) -> MemorySink:
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    with profiling.step(1), profiling.span(semconv.ENGINE_GENERATE) as span:
        measure(profiling, span, completions, slowest, traced)
    profiling.flush()
    return sink


def values(sink: MemorySink, instrument) -> list[float]:
    return [value for each in sink.measurements if each.instrument.name == instrument.name for value in each.values]


def test_counts_are_of_what_was_done_and_of_what_was_refused():
    refused = Completion(
        prompt_index=2, generation_index=0, token_ids=[], finish_reason="error", error=PromptError(2, "is too long")
    )
    assert counts(result(done(0, 4, 1.0), done(1, 2, 2.0), refused)) == {
        semconv.COMPLETIONS: 2,
        semconv.INPUT_TOKENS: 4,
        semconv.OUTPUT_TOKENS: 6,
        semconv.REFUSED: 1,
    }
    assert counts(result(done(0, 4, 1.0)))[semconv.REFUSED] is None


def test_every_request_is_measured_and_servers_apart():
    sink = recorded(result(done(0, 4, 1.0, server="a"), done(1, 2, 2.0, server="b"), done(2, 3, 3.0, server="a")))
    assert sorted(values(sink, semconv.REQUEST_E2E)) == [1.0, 2.0, 3.0]
    assert values(sink, semconv.COMPLETION_LENGTH) == [4, 2, 3]
    assert values(sink, semconv.PROMPT_LENGTH) == [3, 1, 2]
    assert sum(values(sink, semconv.REQUEST_PREEMPTED)) == 3
    by_server = {
        each.attributes[semconv.SERVER]: list(each.values)
        for each in sink.measurements
        if each.instrument.name == semconv.REQUEST_E2E.name
    }
    assert by_server == {"a": [1.0, 3.0], "b": [2.0]}


def test_the_slowest_and_the_aborted_become_spans_but_not_those_that_were_traced():
    completions = result(done(0, 4, 3.0), done(1, 2, 1.0, reason="abort"), done(2, 3, 2.0))
    sink = recorded(completions, slowest=2)
    assert [span.attributes[semconv.PROMPT_INDEX] for span in sink.named(semconv.REQUEST)] == [0, 1, 2]
    assert [span.error for span in sink.named(semconv.REQUEST)] == [None, "aborted", None]
    assert [span.duration for span in sink.named(semconv.REQUEST)] == [3.0, 1.0, 2.0]
    sink = recorded(completions, slowest=1, traced={(0, 0)})
    assert [span.attributes[semconv.PROMPT_INDEX] for span in sink.named(semconv.REQUEST)] == [1]


def test_content_is_recorded_only_where_the_user_asked_for_it():
    completion = done(0, 2, 1.0)
    plain = request_attributes(completion, PROMPTS[0], None, str)
    assert semconv.INPUT_CONTENT not in plain
    assert semconv.OUTPUT_CONTENT not in plain
    shown = request_attributes(completion, PROMPTS[0], ContentCapture(), lambda ids: "-".join(map(str, ids)))
    assert (shown[semconv.INPUT_CONTENT], shown[semconv.OUTPUT_CONTENT]) == ("1-2-3", "7-7")


def test_a_requests_span_has_all_that_is_known_of_it():
    completion = replace(
        done(0, 2, 1.0, server="http://a"), weight_version="v2", weight_versions=[("v1", 0, 1), ("v2", 1, 2)]
    )
    attributes = request_attributes(completion, PROMPTS[0], None, str)
    assert {name: value for name, value in attributes.items() if value is not None} == {
        semconv.INPUT_TOKENS: 3,
        semconv.REQUEST_ID: "r0",
        semconv.OUTPUT_TOKENS: 2,
        semconv.FINISH_REASON: ["stop"],
        semconv.WEIGHT_VERSION: "v2",
        semconv.FIRST_VERSION: "v1",
        semconv.SERVER: "http://a",
        semconv.ADMISSION_SECONDS: 0.0,
        semconv.QUEUE_SECONDS: 0.25,
        semconv.PREFILL_SECONDS: 0.25,
        semconv.DECODE_SECONDS: 0.5,
        semconv.TTFT_SECONDS: 0.5,
        semconv.E2E_SECONDS: 1.0,
        semconv.PREEMPTIONS: 1,
        semconv.CACHED_TOKENS: 2,
    }


def test_each_histogram_has_its_own_field_of_the_timing():
    sink = recorded(result(done(0, 4, 3.0), done(1, 2, 1.0)))
    assert values(sink, semconv.REQUEST_QUEUE) == [0.25, 0.25]
    assert values(sink, semconv.REQUEST_DECODE) == [2.5, 0.5]
    assert values(sink, semconv.REQUEST_TTFT) == [0.5, 0.5]
    assert values(sink, semconv.REQUEST_TPOT) == []
    assert values(sink, semconv.REQUEST_CACHED) == [4]
    assert values(sink, semconv.PROMPT_TOKENS) == [4]
    assert values(sink, semconv.GENERATED_TOKENS) == [6]


def test_throughput_is_of_the_engine_calls_own_seconds():
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    with profiling.span(semconv.ENGINE_GENERATE) as span:
        pass
    span.end_ns = span.start_ns + 4_000_000_000
    measure(profiling, span, result(done(0, 6, 1.0), done(1, 2, 1.0)), 0)
    profiling.flush()
    assert values(sink, semconv.THROUGHPUT) == [2.0]
