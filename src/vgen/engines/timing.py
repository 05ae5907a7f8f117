"""A request's timing, made of vLLM's own timestamps: the same in process and behind a server."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

from ..types import RequestTiming

Times: TypeAlias = tuple[float, float, float, float, float, float]
"""Arrived, queued, scheduled, first token, first token at the front end, last token: seconds of the monotonic clock."""


def times_of(stats: Any) -> Times | None:
    """What vLLM has noted of a request that has ended; None where it had no first token.

    vLLM keeps the arrival by the wall clock alone: a clock that is set meanwhile bends it, and what is counted from it.
    """
    if stats is None or not stats.first_token_ts:
        return None
    arrived = min(time.monotonic() - (time.time() - stats.arrival_time), stats.queued_ts)
    seen = max(arrived + stats.first_token_latency, stats.first_token_ts)
    return arrived, stats.queued_ts, stats.scheduled_ts, stats.first_token_ts, seen, stats.last_token_ts


def timing(times: Times, *, tokens: int, shift: float = 0.0, preemptions: int, cached_tokens: int) -> RequestTiming:
    """`shift` is what to add to `times` for seconds of this process's clock."""
    arrived, queued, scheduled, first, seen, last = times
    return RequestTiming(
        queued_ns=int((queued + shift) * 1e9),
        finished_ns=int((last + shift) * 1e9),
        admission=queued - arrived,
        queue=scheduled - queued,
        prefill=first - scheduled,
        decode=last - first,
        time_to_first_token=seen - arrived,
        time_per_output_token=(last - first) / (tokens - 1) if tokens > 1 else None,
        e2e=last - arrived,
        preemptions=preemptions,
        cached_tokens=cached_tokens,
    )
