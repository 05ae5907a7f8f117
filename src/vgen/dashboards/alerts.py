"""Alert rules for Prometheus: what needs a person, and where that person should look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..profiling import semconv
from ..profiling.measurement import Instrument
from .promql import label, mean, newly, quantile, rate, series

WINDOW_SECONDS = 600
WINDOW = f"{WINDOW_SECONDS // 60}m"
"""The window that rules look at. An alert about an event stays as long."""
TAIL_RATIO = 10
"""The highest ratio of p99 to p50 of the requests' seconds without an alert."""
TAIL_SHARE = 0.5
"""The highest share of the engine calls' time that may be waiting for the slowest sequences."""
TAIL_REQUESTS = 100
"""The least number of requests in the window: with fewer, the p99 is a single request."""
DRIFT_NATS = 0.1
"""The highest mean difference of log-probabilities between engine and trainer without an alert. A quantized engine can
reach it by rounding alone."""
LEAK_BYTES = 256 * 2**20
"""The most device memory in bytes that sleeping may fail to free."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule. In `summary` and `description` Prometheus replaces `{{ $labels.x }}` and `{{ $value }}`."""

    name: str
    expression: str
    summary: str
    description: str
    severity: str = "warning"
    wait: str = "0s"
    """How long the expression must be true before the alert fires."""


_PROCESS = "{{ $labels.job }} {{ $labels.instance }}"
_BY = ("job",)


def rules() -> dict[str, Any]:
    """The content of the rule file."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.description},
        }
        for alert in alerts()
    ]
    return {"groups": [{"name": "vgen", "rules": rules}]}


def _value_of(attribute: str) -> str:
    return "{{ $labels." + label(attribute) + " }}"


def _increased(instrument: Instrument, *where: str, part: str = "") -> str:
    return newly(series(instrument, where, part), WINDOW)


_ENGINE = f"{_PROCESS}, engine {_value_of(semconv.ENGINE_NUMBER)}"


def alerts() -> Iterator[Alert]:
    """All rules."""
    yield Alert(
        "VgenEngineStalled",
        f"{series(semconv.STALLED, ())} > 0",
        f"{_ENGINE}: no progress for {{{{ $value | humanizeDuration }}}}",
        "A call of the engine produced no token, no completion and no new phase. The log of the process names the open "
        f"spans. `vgen trace RUN --follow` shows them with the open span `{semconv.STALL}`.",
        "critical",
        wait="1m",
    )
    yield Alert(
        "VgenWeightSyncFailed",
        _increased(semconv.duration(semconv.WEIGHT_SYNC), f'{label(semconv.ERROR_TYPE)}!=""', part="count"),
        f"{_PROCESS}: a weight sync failed",
        f"`{semconv.WEIGHT_SYNC}` ended with {_value_of(semconv.ERROR_TYPE)}. The engine's weights are unknown. It "
        "generates nothing until a full sync succeeds.",
        "critical",
    )
    yield Alert(
        "VgenEngineFailed",
        f"{series(semconv.ENGINE_STATE, ())} == {semconv.STATES.index('failed')}",
        f"{_ENGINE}: the engine failed and refuses to generate",
        "Its weights are unknown, or the engine stopped. If it still runs, a successful sync makes it usable again.",
        "critical",
        wait="5m",
    )
    yield Alert(
        "VgenSleepLeaks",
        f"{series(semconv.LEAKED_TOTAL, ())} > {LEAK_BYTES}",
        f"{_PROCESS}: sleeping frees {{{{ $value | humanize1024 }}}}B less device memory than the first time",
        f"At sleep level {_value_of(semconv.SLEEP_LEVEL)}. The trainer may run out of memory. The attribute "
        f"`{semconv.LEAKED}` of the spans `{semconv.SLEEP}` shows at which step it began.",
    )
    at = {q: quantile(q, semconv.REQUEST_E2E, *_BY, where=(), window=WINDOW) for q in (0.5, 0.99)}
    requests = f"{rate(semconv.REQUEST_E2E, *_BY, where=(), part='count', window=WINDOW)} * {WINDOW_SECONDS}"
    yield Alert(
        "VgenLongTail",
        f"{at[0.99]} / {at[0.5]} > {TAIL_RATIO} and {requests} >= {TAIL_REQUESTS}",
        "{{ $labels.job }}: the slowest requests take {{ $value | humanize }} times the median",
        "p99 divided by p50 of the requests' seconds. `vgen report RUN` lists the slowest requests.",
        wait=WINDOW,
    )
    request = mean(semconv.REQUEST_E2E, *_BY, where=(), window=WINDOW)
    call = mean(semconv.duration(semconv.ENGINE_GENERATE), *_BY, where=(), window=WINDOW)
    yield Alert(
        "VgenWaitingForTail",
        f"1 - ({request}) / ({call}) > {TAIL_SHARE}",
        "{{ $labels.job }}: {{ $value | humanizePercentage }} of the engine calls' time is waiting for the slowest",
        "In that share of a call the average sequence had ended and the longest still ran: the device is mostly idle. "
        "Use lower token limits, more prompts in a call, or rollouts that do not wait for the whole batch.",
        wait=WINDOW,
    )
    yield Alert(
        "VgenLogprobsDrift",
        f"{mean(semconv.DRIFT, *_BY, where=(), window=WINDOW)} > {DRIFT_NATS}",
        "{{ $labels.job }}: engine and trainer differ by {{ $value | humanize }} nats a token",
        "The log-probabilities of sampled tokens are not those of the trainer's model: a weight is stale, or the "
        "engine has another configuration. `generation.verify()` says whether rounding explains it.",
        wait="1m",
    )
    yield Alert(
        "VgenTelemetryDropped",
        _increased(semconv.DROPPED),
        f"{_PROCESS}: telemetry was lost",
        f"{_value_of(semconv.SINK)} dropped records, because its backend is slow, full or down. Training is not "
        "affected. The dashboards have gaps.",
    )
