"""What one call of `generate` puts into the telemetry."""

from __future__ import annotations

from collections.abc import Callable

from ..types import Completion, Completions, RequestTiming
from . import names
from .context import ProfilingContext
from .records import Span


def counts(result: Completions) -> dict[str, int]:
    """What a call moved, as attributes of its span."""
    done = [completion for completion in result if completion.error is None]
    tokens_in = sum(len(result.prompt_ids[completion.prompt_index]) for completion in done)
    return {names.COMPLETIONS: len(done), names.INPUT_TOKENS: tokens_in, names.OUTPUT_TOKENS: result.output_tokens}


def measure(
    profiling: ProfilingContext,
    engine_span: Span,
    result: Completions,
    slowest: int,
    decode: Callable[[list[int]], str] = str,
) -> None:
    """Every request into the metrics, the `slowest` as spans beneath the engine's.

    `decode` makes text of token ids, where content may be recorded.
    """
    done = [completion for completion in result if completion.error is None]
    if not done:
        return
    prompt_lengths = [len(result.prompt_ids[completion.prompt_index]) for completion in done]
    tokens_in, tokens_out = sum(prompt_lengths), result.output_tokens
    profiling.record(names.PROMPT_TOKENS, tokens_in)
    profiling.record(names.GENERATED_TOKENS, tokens_out)
    if engine_span.duration:
        profiling.record(names.THROUGHPUT, tokens_out / engine_span.duration)
    profiling.record_many(names.COMPLETION_LENGTH, [len(completion.token_ids) for completion in done])
    profiling.record_many(names.PROMPT_LENGTH, prompt_lengths)
    timed = [(completion, completion.timing) for completion in done if completion.timing is not None]
    timings = [timing for _, timing in timed]
    profiling.record_many(names.REQUEST_E2E, [timing.e2e for timing in timings])
    profiling.record_many(names.REQUEST_QUEUE, [timing.queue for timing in timings])
    profiling.record_many(names.REQUEST_PREFILL, [timing.prefill for timing in timings])
    profiling.record_many(names.REQUEST_TTFT, [timing.time_to_first_token for timing in timings])
    per_token = [timing.time_per_output_token for timing in timings]
    profiling.record_many(names.REQUEST_TPOT, [seconds for seconds in per_token if seconds is not None])
    chosen = sorted(timed, key=lambda pair: pair[1].e2e, reverse=True)[:slowest]
    for completion, timing in sorted(chosen, key=lambda pair: pair[1].queued_ns):
        prompt = result.prompt_ids[completion.prompt_index]
        attributes = _request(completion, timing, len(prompt))
        if profiling.capture is not None:
            attributes[names.INPUT_CONTENT] = profiling.capture.text(decode(prompt))
            attributes[names.OUTPUT_CONTENT] = profiling.capture.text(decode(completion.token_ids))
        profiling.rebuilt(names.REQUEST, timing.queued_ns, timing.finished_ns, attributes, parent=engine_span)


def _request(completion: Completion, timing: RequestTiming, prompt_tokens: int) -> dict[str, object]:
    return {
        names.REQUEST_ID: completion.request_id,
        names.PROMPT_INDEX: completion.prompt_index,
        names.GENERATION_INDEX: completion.generation_index,
        names.INPUT_TOKENS: prompt_tokens,
        names.OUTPUT_TOKENS: len(completion.token_ids),
        names.FINISH_REASON: [completion.finish_reason or "unknown"],
        names.WEIGHT_VERSION: completion.weight_version,
        names.QUEUE_SECONDS: timing.queue,
        names.TTFT_SECONDS: timing.time_to_first_token,
        names.TPOT_SECONDS: timing.time_per_output_token,
        names.PREEMPTIONS: timing.preemptions,
        names.CACHED_TOKENS: timing.cached_tokens,
    }
