"""vLLM's outputs as completions: the same for an engine in this process and for a server's batch route."""

from __future__ import annotations

import math
import time
from typing import Any

from ..engine_protocol import Request
from ..types import Completion, RequestTiming, none_for_nan


def completion_of(request: Request, output: Any, *, top: bool) -> Completion:
    """What vLLM sampled for `request`, from its finished `RequestOutput`.

    `top` asks for `Completion.top_logprobs`, which vLLM reports where `Sampling.logprobs` is above 0.
    """
    result, prompt_logprobs = output.outputs[0], None
    token_ids = list(result.token_ids)
    logprobs = top_logprobs = None
    if result.logprobs is not None:
        logprobs = _firsts(result.logprobs, len(token_ids))
        if top:
            top_logprobs = _likeliest(result.logprobs)
    # Of a request that was aborted before its prefill, vLLM has the first entry alone.
    if output.prompt_logprobs is not None and not (
        result.finish_reason == "abort" and len(output.prompt_logprobs) != len(output.prompt_token_ids)
    ):
        prompt_logprobs = _firsts(output.prompt_logprobs, len(output.prompt_token_ids))
    versions = [(span.version, span.start, span.end) for span in result.weight_versions or ()] or None
    return Completion(
        rank=request.rank,
        prompt_index=request.prompt_index,
        generation_index=request.generation_index,
        token_ids=token_ids,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=result.finish_reason,
        weight_version=versions[-1][0] if versions else None,
        weight_versions=versions,
        request_id=output.request_id,
        timing=timing_of(output.metrics, output.num_cached_tokens or 0),
    )


def timing_of(stats: Any, cached_tokens: int) -> RequestTiming | None:
    """vLLM's timestamps of a finished request, on this process's monotonic clock; None where it had no first token.

    vLLM records the arrival by the wall clock alone. If somebody sets that clock while the request runs, `admission`
    and everything that is counted from the arrival are wrong by as much, but never negative.
    """
    if stats is None or not stats.first_token_ts:
        return None
    queued, scheduled, first, last = stats.queued_ts, stats.scheduled_ts, stats.first_token_ts, stats.last_token_ts
    arrived = min(time.monotonic() - (time.time() - stats.arrival_time), queued)
    tokens = stats.num_generation_tokens
    return RequestTiming(
        queued_ns=int(queued * 1e9),
        finished_ns=int(last * 1e9),
        admission=queued - arrived,
        queue=scheduled - queued,
        prefill=first - scheduled,
        decode=last - first,
        time_to_first_token=max(stats.first_token_latency, first - arrived),
        time_per_output_token=(last - first) / (tokens - 1) if tokens > 1 else None,
        e2e=last - arrived,
        preemptions=stats.num_preemptions,
        cached_tokens=cached_tokens,
    )


def _firsts(flat: Any, count: int) -> list[float | None]:
    """The first log-probability of each position, which is that of the token itself; None where there is none.

    `flat` is vLLM's `FlatLogprobs`, whose lists hold all alternatives of all positions.
    """
    logprobs, starts = flat.logprobs, flat.start_indices
    if len(starts) != count:
        raise ValueError(f"vLLM returned log-probabilities of {len(starts)} tokens where there are {count}")
    if len(logprobs) != count or starts != list(range(count)):  # several at a position, or none at the first
        ends = flat.end_indices
        logprobs = [logprobs[start] if start < end else math.nan for start, end in zip(starts, ends, strict=True)]
    return none_for_nan(logprobs)


def _likeliest(flat: Any) -> list[list[tuple[int, float | None]]]:
    """At each position `(token id, log-probability)`, likeliest first, each token once."""
    rows: list[list[tuple[int, float | None]]] = []
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        # The token itself comes first, and again among the alternatives if it is one of them.
        ranked = sorted(zip(flat.ranks[start:end], range(start, end), strict=True))
        tokens = dict.fromkeys(flat.token_ids[index] for _, index in ranked)
        values = dict(zip(flat.token_ids[start:end], none_for_nan(flat.logprobs[start:end]), strict=True))
        rows.append([(token, values[token]) for token in tokens])
    return rows
