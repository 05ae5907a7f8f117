"""Alerting rules for Prometheus: what should wake somebody, and what to look at then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..profiling import names
from ..profiling.records import Instrument
from .promql import label, mean, newly, quantile, rate, series

WINDOW = "10m"
"""How far back rules look, and so how long an alert about an event stays."""
TAIL_RATIO = 10
"""How many times as long as the median request the slowest hundredth may take."""
TAIL_SHARE = 0.5
"""Which part of the engine calls may be spent on waiting for the slowest sequences."""
TAIL_REQUESTS = 100
"""Requests within the window, below which their p99 is one request and says nothing."""


LEAK_BYTES = 256 * 2**20
"""Device memory that sleeping may fail to give back."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule. In `summary` and `description` Prometheus replaces `{{ $labels.x }}` and `{{ $value }}`."""

    name: str
    expression: str
    summary: str
    description: str
    severity: str = "warning"
    wait: str = "0s"
    """How long it must be so."""


_PROCESS = "{{ $labels.job }} {{ $labels.instance }}"
_BY = ("job",)


def alerts() -> tuple[Alert, ...]:
    """All rules."""
    return (_stalled(), _failed_sync(), _failed_engine(), _leak(), _tail(), _tail_cost(), _dropped())


def rules() -> dict[str, Any]:
    """The rule file's content."""
    found = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.description},
        }
        for alert in alerts()
    ]
    return {"groups": [{"name": "vgen", "rules": found}]}


def _value_of(attribute: str) -> str:
    return "{{ $labels." + label(attribute) + " }}"


def _grown(instrument: Instrument, *where: str, part: str = "") -> str:
    return newly(series(instrument, where, part), WINDOW)


_ENGINE = f"{_PROCESS}, engine {_value_of(names.ENGINE_NUMBER)}"


def _stalled() -> Alert:
    return Alert(
        "VgenEngineStalled",
        f"{series(names.STALLED, ())} > 0",
        f"{_ENGINE}: nothing has come for {{{{ $value | humanizeDuration }}}}",
        f"A call has had no token, completion or phase. The process's log names the open spans, `{names.STALL}` is "
        "open in its JSONL record, and `vgen trace RUN --follow` shows where it stands.",
        "critical",
        wait="1m",
    )


def _failed_engine() -> Alert:
    return Alert(
        "VgenEngineFailed",
        f"{series(names.ENGINE_STATE, ())} == {names.STATES.index('failed')}",
        f"{_ENGINE}: has failed and refuses to generate",
        "Its weights are unknown or it broke. A sync that succeeds makes it usable again, where it still runs.",
        "critical",
        wait="5m",
    )


def _leak() -> Alert:
    return Alert(
        "VgenSleepLeaks",
        f"{series(names.LEAKED_TOTAL, ())} > {LEAK_BYTES}",
        f"{_PROCESS}: sleeping leaves {{{{ $value | humanize1024 }}}}B more on the device than at first",
        f"After sleep level {_value_of(names.SLEEP_LEVEL)}. The trainer will miss it sooner or later. "
        f"`{names.LEAKED}` on the spans `{names.SLEEP}` says since which step.",
    )


def _failed_sync() -> Alert:
    sync = names.duration(names.WEIGHT_SYNC)
    return Alert(
        "VgenWeightSyncFailed",
        _grown(sync, f'{label(names.ERROR_TYPE)}!=""', part="count"),
        f"{_PROCESS}: a weight sync failed",
        f"{_value_of(names.ERROR_TYPE)} ended `{names.WEIGHT_SYNC}`. The engine's weights are unknown: nothing is "
        "generated from it until a full sync succeeds.",
        "critical",
    )


def _tail() -> Alert:
    def at(q: float) -> str:
        return quantile(q, names.REQUEST_E2E, *_BY, where=(), window=WINDOW)

    requests = f"{rate(names.REQUEST_E2E, *_BY, where=(), part='count', window=WINDOW)} * {_seconds(WINDOW)}"
    return Alert(
        "VgenLongTail",
        f"{at(0.99)} / {at(0.5)} > {TAIL_RATIO} and {requests} >= {TAIL_REQUESTS}",
        "{{ $labels.job }}: the slowest requests take {{ $value | humanize }} times the median",
        "p99 over p50 of a request's seconds. `vgen report RUN` names the slowest requests and what they waited for.",
        wait=WINDOW,
    )


def _tail_cost() -> Alert:
    request = mean(names.REQUEST_E2E, *_BY, where=(), window=WINDOW)
    call = mean(names.duration(names.ENGINE_GENERATE), *_BY, where=(), window=WINDOW)
    return Alert(
        "VgenWaitingForTail",
        f"1 - ({request}) / ({call}) > {TAIL_SHARE}",
        "{{ $labels.job }}: {{ $value | humanizePercentage }} of the engine's calls is waiting for the slowest",
        "For that part of a call the average sequence had already ended and the longest had not: the device is idle. "
        "Shorter limits, more prompts a call, or rollouts that do not wait for the whole batch help.",
        wait=WINDOW,
    )


def _dropped() -> Alert:
    return Alert(
        "VgenTelemetryDropped",
        _grown(names.DROPPED),
        f"{_PROCESS}: telemetry was lost",
        f"{_value_of(names.SINK)} took no more: its backend is slow, full or dead. The work goes on; what the "
        "dashboards show has holes.",
    )


def _seconds(window: str) -> int:
    return int(window[:-1]) * {"s": 1, "m": 60, "h": 3600}[window[-1]]
