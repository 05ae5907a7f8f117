"""What changed between two runs, and whether it got worse."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SMALLEST = 0.01
"""Of a step: a change of seconds below this part of its median is noise, whatever its own percentage."""


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of both runs."""

    name: str
    unit: str
    before: float
    after: float
    worse: bool
    """Whether it changed for the worse by more than the threshold."""
    better: bool

    @property
    def percent(self) -> float | None:
        """By how much it changed; None from zero."""
        return 100 * (self.after / self.before - 1) if self.before else None


def compare(before: dict[str, Any], after: dict[str, Any], threshold: float) -> list[Change]:
    """The figures that both summaries have. `threshold` is in percent.

    `before` may be anything that was read from a file: what is no summary raises KeyError, TypeError or AttributeError.

    Seconds of a step are medians over the steps, so that one warm-up step does not decide; requests'
    percentiles are those of all requests of the run. The tail is a share, and its change is one of points.
    """
    least = SMALLEST * (_median(step["seconds"] for step in before["steps"]) or 0.0)
    found: list[Change] = []
    for name, unit, read, more_is_worse in _figures(before, after):
        old, new = read(before), read(after)
        if old is None or new is None:
            continue
        floor = least if unit == "s" and not name.startswith("request") else 0.0
        most = threshold if unit == "%" else max(threshold / 100 * abs(old), floor)
        grew, shrank = new - old > most, old - new > most
        found.append(Change(name, unit, old, new, grew if more_is_worse else shrank, shrank if more_is_worse else grew))
    return found


def _figures(*summaries: dict[str, Any]) -> list[tuple[str, str, Callable[[dict[str, Any]], float | None], bool]]:
    phases = [name for summary in summaries for name in summary["total"]["phases"]]
    found: list[tuple[str, str, Callable[[dict[str, Any]], float | None], bool]] = [
        ("step", "s", lambda one: _median(step["seconds"] for step in one["steps"]), True),
    ]
    for phase in dict.fromkeys(phases):
        found.append((f"step: {phase}", "s", lambda one, phase=phase: _phase(one, phase), True))
    found.append(
        ("between steps: idle", "s", lambda one: _median(step["after"].get("idle") for step in one["steps"]), True)
    )
    found.append(("tokens per second", "1/s", lambda one: one["total"]["tokens_per_second"], False))
    for name, quantile in (
        *(("e2e", "p50"), ("e2e", "p99"), ("queue", "p99"), ("time_to_first_token", "p50")),
        *(("time_to_first_token", "p99"), ("time_per_output_token", "p50"), ("time_per_output_token", "p99")),
    ):
        read = lambda one, name=name, quantile=quantile: one["total"]["requests"].get(name, {}).get(quantile)  # noqa: E731
        found.append((f"request: {name} {quantile}", "s", read, True))
    found.append(("tail of generation", "%", _tail, True))
    found.append(
        ("sync: rate", "GB/s", lambda one: _median(sync["gigabytes_per_second"] for sync in one["syncs"]), False)
    )
    found.append(("sync: paused", "s", lambda one: _median(sync["paused_seconds"] for sync in one["syncs"]), True))
    found.append(
        ("sleep: bytes freed", "By", lambda one: _median(cycle["freed_bytes"] for cycle in one["memory"]), False)
    )
    return found


def _phase(summary: dict[str, Any], phase: str) -> float | None:
    return _median(step["phases"].get(phase, 0.0) for step in summary["steps"])


def _tail(summary: dict[str, Any]) -> float | None:
    tail = summary["total"]["tail"]
    return None if tail is None else 100 * tail["share"] if tail["long"] else 0.0


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
