"""What one call of `generate` puts into the telemetry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from ..types import Completion, Completions, RequestTiming
from . import names
from .content import ContentCapture
from .context import ProfilingContext
from .records import Span


def counts(result: Completions) -> dict[str, int | None]:
    """What a call moved, as attributes of its span."""
    done = [completion for completion in result if completion.error is None]
    tokens_in = sum(len(result.prompt_ids[completion.prompt_index]) for completion in done)
    refused = len({completion.prompt_index for completion in result if completion.error is not None}) or None
    own = {names.COMPLETIONS: len(done), names.INPUT_TOKENS: tokens_in, names.OUTPUT_TOKENS: result.output_tokens}
    return {**own, names.REFUSED: refused}


def measure(
    profiling: ProfilingContext,
    engine_span: Span,
    result: Completions,
    slowest: int,
    traced: Collection[tuple[int | None, int]] = (),
    decode: Callable[[list[int]], str] = str,
) -> None:
    """Every request into the metrics; the `slowest` and the aborted as spans beneath the engine's, but for `traced`.

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
    servers: dict[str | None, list[RequestTiming]] = {}
    for completion, timing in timed:
        servers.setdefault(completion.server, []).append(timing)
    for server, own in servers.items():
        # The same requests in the same order: together they say when each of them ran.
        where = {names.ENGINE_CALL: engine_span.span_id, names.SERVER: server}
        starts = [(timing.arrived_ns - engine_span.start_ns) / 1e9 for timing in own]
        profiling.record_many(names.REQUEST_START, starts, **where)
        profiling.record_many(names.REQUEST_E2E, [timing.e2e for timing in own], **where)
    profiling.record_many(names.REQUEST_ADMISSION, [timing.admission for timing in timings])
    profiling.record_many(names.REQUEST_QUEUE, [timing.queue for timing in timings])
    profiling.record_many(names.REQUEST_PREFILL, [timing.prefill for timing in timings])
    profiling.record_many(names.REQUEST_DECODE, [timing.decode for timing in timings])
    profiling.record_many(names.REQUEST_TTFT, [timing.time_to_first_token for timing in timings])
    per_token = [timing.time_per_output_token for timing in timings]
    profiling.record_many(names.REQUEST_TPOT, [seconds for seconds in per_token if seconds is not None])
    if timings:
        profiling.record(names.REQUEST_PREEMPTED, sum(timing.preemptions for timing in timings))
        profiling.record(names.REQUEST_CACHED, sum(timing.cached_tokens for timing in timings))
    for reason, count in Counter(completion.finish_reason or "unknown" for completion in done).items():
        profiling.record(names.REQUEST_FINISHED, count, **{names.FINISHED_BY: reason})
    ranked = sorted(timed, key=lambda pair: pair[1].e2e, reverse=True)
    chosen = [*ranked[:slowest], *(pair for pair in ranked[slowest:] if pair[0].finish_reason == "abort")]
    for completion, timing in sorted(chosen, key=lambda pair: pair[1].arrived_ns):
        if (completion.prompt_index, completion.generation_index) in traced:
            continue
        attributes = {
            names.PROMPT_INDEX: completion.prompt_index,
            names.GENERATION_INDEX: completion.generation_index,
            **request_attributes(completion, result.prompt_ids[completion.prompt_index], profiling.capture, decode),
        }
        error = "aborted" if completion.finish_reason == "abort" else None
        start, end = timing.arrived_ns, timing.finished_ns
        profiling.rebuilt(names.REQUEST, start, end, attributes, parent=engine_span, error=error)


def request_attributes(
    completion: Completion, prompt: Sequence[int], capture: ContentCapture | None, decode: Callable[[list[int]], str]
) -> dict[str, object]:
    """What a completion's span says of it once it is done."""
    own: dict[str, object] = {
        names.INPUT_TOKENS: len(prompt),
        names.REQUEST_ID: completion.request_id,
        names.OUTPUT_TOKENS: len(completion.token_ids),
        names.FINISH_REASON: [completion.finish_reason or "unknown"],
        names.WEIGHT_VERSION: completion.weight_version,
        names.FIRST_VERSION: completion.weight_versions[0][0] if completion.weight_versions else None,
        names.SERVER: completion.server,
    }
    timing = completion.timing
    if timing is not None:
        own |= {
            names.ADMISSION_SECONDS: timing.admission,
            names.QUEUE_SECONDS: timing.queue,
            names.PREFILL_SECONDS: timing.prefill,
            names.DECODE_SECONDS: timing.decode,
            names.E2E_SECONDS: timing.e2e,
            names.TTFT_SECONDS: timing.time_to_first_token,
            names.TPOT_SECONDS: timing.time_per_output_token,
            names.PREEMPTIONS: timing.preemptions,
            names.CACHED_TOKENS: timing.cached_tokens,
        }
    if capture is not None:
        own[names.INPUT_CONTENT] = capture.text(decode(list(prompt)))
        own[names.OUTPUT_CONTENT] = capture.text(decode(completion.token_ids))
    return own
