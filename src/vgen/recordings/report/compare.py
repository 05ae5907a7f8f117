"""What changed between two runs, and whether it got worse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .figure_types import RunFigures, median

NOISE = 0.01
"""A change of a step's seconds below this share of the median step is noise, whatever its own percentage."""
_PERCENTILES = (
    ("e2e", "p50"),
    ("e2e", "p99"),
    ("queue", "p99"),
    ("time_to_first_token", "p50"),
    ("time_to_first_token", "p99"),
    ("time_per_output_token", "p50"),
    ("time_per_output_token", "p99"),
)
"""Of requests: the distributions that are compared, and by what."""

_Figure: TypeAlias = "tuple[str, str, Callable[[RunFigures], float | None], bool]"
"""Name, unit, how to read it, and whether more of it is worse."""


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
    """Whether it changed for the better by more than the threshold."""

    @property
    def percent(self) -> float | None:
        """By how much it changed; None where it was zero."""
        return 100 * (self.after / self.before - 1) if self.before else None


def compare(before: RunFigures, after: RunFigures, threshold: float) -> list[Change]:
    """The figures that both runs have. `threshold` is in percent.

    Seconds of a step are medians over the steps, so one warm-up step does not decide. Percentiles of requests are those
    of all requests of the run. The tail is a share: its change is in percentage points.
    """
    noise = NOISE * (median(step.seconds for step in before.steps) or 0.0)
    changes: list[Change] = []
    for name, unit, read, more_is_worse in _figures(before, after):
        old, new = read(before), read(after)
        if old is None or new is None:
            continue
        least = noise if unit == "s" and not name.startswith("request") else 0.0
        allowed = threshold if unit == "%" else max(threshold / 100 * abs(old), least)
        grew, shrank = new - old > allowed, old - new > allowed
        worse, better = (grew, shrank) if more_is_worse else (shrank, grew)
        changes.append(Change(name, unit, old, new, worse, better))
    return changes


def _figures(*runs: RunFigures) -> Iterator[_Figure]:
    yield "step", "s", lambda run: median(step.seconds for step in run.steps), True
    for phase in dict.fromkeys(name for run in runs for name in run.total.phases):
        yield f"step: {phase}", "s", _phase(phase), True
    yield "between steps: idle", "s", lambda run: median(step.after.get("idle") for step in run.steps), True
    yield "tokens per second", "1/s", lambda run: run.total.tokens_per_second, False
    for name, percentile in _PERCENTILES:
        yield f"request: {name} {percentile}", "s", _percentile(name, percentile), True
    yield "tail of generation", "%", _tail_percent, True
    yield "sync: rate", "GB/s", lambda run: median(sync.gigabytes_per_second for sync in run.syncs), False
    yield "sync: paused", "s", lambda run: median(sync.paused_seconds for sync in run.syncs), True
    yield "sleep: bytes freed", "By", lambda run: median(cycle.freed_bytes for cycle in run.memory), False


def _phase(phase: str) -> Callable[[RunFigures], float | None]:
    return lambda run: median(step.phases.get(phase, 0.0) for step in run.steps)


def _percentile(name: str, percentile: str) -> Callable[[RunFigures], float | None]:
    return lambda run: getattr(run.total.requests.get(name), percentile, None)


def _tail_percent(run: RunFigures) -> float | None:
    tail = run.total.tail
    return None if tail is None else 100 * tail.share if tail.long else 0.0
