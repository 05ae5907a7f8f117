"""What one call of `generate` adds to the telemetry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter

from ..profiling import ContentCapture, ProfilingContext, Span, semconv
from ..types import Completion, Completions, RequestTiming

_SECONDS = (
    ("admission", semconv.ADMISSION_SECONDS, semconv.REQUEST_ADMISSION),
    ("queue", semconv.QUEUE_SECONDS, semconv.REQUEST_QUEUE),
    ("prefill", semconv.PREFILL_SECONDS, semconv.REQUEST_PREFILL),
    ("decode", semconv.DECODE_SECONDS, semconv.REQUEST_DECODE),
    ("time_to_first_token", semconv.TTFT_SECONDS, semconv.REQUEST_TTFT),
    ("time_per_output_token", semconv.TPOT_SECONDS, semconv.REQUEST_TPOT),
)
"""Fields of `RequestTiming`, each with its span attribute and its histogram."""


def counts(result: Completions) -> dict[str, int | None]:
    """Return the sizes of a call as attributes of its span. Refused prompts are None if there are none."""
    done = _done(result)
    return {
        semconv.COMPLETIONS: len(done),
        semconv.INPUT_TOKENS: sum(len(result.prompt_ids[completion.prompt_index]) for completion in done),
        semconv.OUTPUT_TOKENS: result.output_tokens,
        semconv.REFUSED: len({each.prompt_index for each in result if each.error is not None}) or None,
    }


def measure(
    profiling: ProfilingContext,
    engine_span: Span,
    result: Completions,
    slowest: int,
    traced: Collection[tuple[int | None, int]] = (),
    decode: Callable[[list[int]], str] = str,
) -> None:
    """Record all requests of a call in the metrics; rebuild the spans of the `slowest` and of the aborted ones.

    Args:
        profiling: Receives the records.
        engine_span: The span of the engine call: the parent of the rebuilt spans.
        result: The call's completions.
        slowest: How many of the slowest requests get a span.
        traced: `(prompt_index, generation_index)` of requests that already have one.
        decode: Makes text of token IDs, if content may be recorded.
    """
    done = _done(result)
    if not done:
        return
    _measure_tokens(profiling, engine_span, result, done)
    timed = [(completion, completion.timing) for completion in done if completion.timing is not None]
    _measure_requests(profiling, engine_span, timed)
    for reason, count in Counter(completion.finish_reason or "unknown" for completion in done).items():
        profiling.record(semconv.REQUEST_FINISHED, count, **{semconv.FINISHED_BY: reason})
    for completion, timing in _chosen(timed, slowest):
        if (completion.prompt_index, completion.generation_index) not in traced:
            attributes = {
                semconv.PROMPT_INDEX: completion.prompt_index,
                semconv.GENERATION_INDEX: completion.generation_index,
                **request_attributes(completion, result.prompt_ids[completion.prompt_index], profiling.capture, decode),
            }
            error = "aborted" if completion.finish_reason == "abort" else None
            start, end = timing.arrived_ns, timing.finished_ns
            profiling.rebuilt(semconv.REQUEST, start, end, attributes, parent=engine_span, error=error)


def request_attributes(
    completion: Completion, prompt: Sequence[int], capture: ContentCapture | None, decode: Callable[[list[int]], str]
) -> dict[str, object]:
    """Return the attributes of a completion's span. `prompt` are the prompt's token IDs."""
    attributes: dict[str, object] = {
        semconv.INPUT_TOKENS: len(prompt),
        semconv.REQUEST_ID: completion.request_id,
        semconv.OUTPUT_TOKENS: len(completion.token_ids),
        semconv.FINISH_REASON: [completion.finish_reason or "unknown"],
        semconv.WEIGHT_VERSION: completion.weight_version,
        semconv.FIRST_VERSION: completion.weight_versions[0][0] if completion.weight_versions else None,
        semconv.SERVER: completion.server,
    }
    timing = completion.timing
    if timing is not None:
        attributes |= {attribute: getattr(timing, field) for field, attribute, _ in _SECONDS}
        attributes[semconv.E2E_SECONDS] = timing.e2e
        attributes[semconv.PREEMPTIONS] = timing.preemptions
        attributes[semconv.CACHED_TOKENS] = timing.cached_tokens
    if capture is not None:
        attributes[semconv.INPUT_CONTENT] = capture.text(decode(list(prompt)))
        attributes[semconv.OUTPUT_CONTENT] = capture.text(decode(completion.token_ids))
    return attributes


def _done(result: Completions) -> list[Completion]:
    return [completion for completion in result if completion.error is None]


def _measure_tokens(
    profiling: ProfilingContext, engine_span: Span, result: Completions, done: Sequence[Completion]
) -> None:
    prompt_lengths = [len(result.prompt_ids[completion.prompt_index]) for completion in done]
    profiling.record(semconv.PROMPT_TOKENS, sum(prompt_lengths))
    profiling.record(semconv.GENERATED_TOKENS, result.output_tokens)
    if engine_span.duration:
        profiling.record(semconv.THROUGHPUT, result.output_tokens / engine_span.duration)
    profiling.record_many(semconv.COMPLETION_LENGTH, [len(completion.token_ids) for completion in done])
    profiling.record_many(semconv.PROMPT_LENGTH, prompt_lengths)


def _measure_requests(
    profiling: ProfilingContext, engine_span: Span, timed: Sequence[tuple[Completion, RequestTiming]]
) -> None:
    timings = [timing for _, timing in timed]
    by_server: dict[str | None, list[RequestTiming]] = {}
    for completion, timing in timed:
        by_server.setdefault(completion.server, []).append(timing)
    for server, server_timings in by_server.items():
        # Both records have the requests in the same order: a reader pairs them to see when each request ran.
        where = {semconv.ENGINE_CALL: engine_span.span_id, semconv.SERVER: server}
        starts = [(timing.arrived_ns - engine_span.start_ns) / 1e9 for timing in server_timings]
        profiling.record_many(semconv.REQUEST_START, starts, **where)
        profiling.record_many(semconv.REQUEST_E2E, [timing.e2e for timing in server_timings], **where)
    for field, _, histogram in _SECONDS:
        values = map(attrgetter(field), timings)
        profiling.record_many(histogram, [seconds for seconds in values if seconds is not None])
    if timings:
        profiling.record(semconv.REQUEST_PREEMPTED, sum(timing.preemptions for timing in timings))
        profiling.record(semconv.REQUEST_CACHED, sum(timing.cached_tokens for timing in timings))


def _chosen(timed: Sequence[tuple[Completion, RequestTiming]], slowest: int) -> list[tuple[Completion, RequestTiming]]:
    """The slowest and the aborted requests, by arrival."""
    ranked = sorted(timed, key=lambda pair: pair[1].e2e, reverse=True)
    chosen = [*ranked[:slowest], *(pair for pair in ranked[slowest:] if pair[0].finish_reason == "abort")]
    return sorted(chosen, key=lambda pair: pair[1].arrived_ns)
