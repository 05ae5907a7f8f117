"""What `vgen check` prints: a line for each case as it ends, advice for failures, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .session import Outcome

SHOWN = {"right": "right", "wrong": "WRONG", "refused": "REFUSED", "error": "ERROR", "skipped": "skipped"}
NAME_WIDTH = 44


def line(outcome: Outcome) -> str:
    """One case in one line: the measured difference beside its bound, as multiples of the rounding noise."""
    measured = outcome.measurement
    figures = "" if measured is None else f"{measured.ratio:9.3g} of {measured.bound:g}  {measured.largest:8.1e} nats"
    start = f"{SHOWN[outcome.status]:8} {outcome.case:{NAME_WIDTH}} {figures:32} {outcome.seconds:6.1f} s"
    return f"{start}  {_first_line(outcome.detail)}".rstrip()


def advice(outcomes: Sequence[Outcome]) -> str:
    """For each case that is not right: what was seen, what usually causes it, and what to do."""
    parts: list[str] = []
    for outcome in outcomes:
        if outcome.status in ("wrong", "refused", "error"):
            parts.append(f"{SHOWN[outcome.status]} {outcome.case}: {outcome.detail}")
            if outcome.cause:
                parts += [f"  usual cause: {outcome.cause}", f"  what to do:  {outcome.fix}"]
    return "\n".join(parts)


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many cases ended in which way."""
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in SHOWN}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if all is right, 1 if an engine is wrong or refuses what it should take, 2 if a case could not be run."""
    statuses = {outcome.status for outcome in outcomes}
    return 1 if statuses & {"wrong", "refused"} else 2 if "error" in statuses or "right" not in statuses else 0


def as_json(facts: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything as one JSON object; a NaN becomes null."""
    cases = [asdict(outcome) for outcome in outcomes]
    return _plain({"exit_code": exit_code(outcomes), **facts, "summary": summary(outcomes), "cases": cases})


def _first_line(text: str) -> str:
    first = text.partition("\n")[0]
    return first if len(first) <= 90 else first[:87] + "…"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
