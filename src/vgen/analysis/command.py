"""`vgen report`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .compare import compare
from .summary import summarize
from .why import explain

NOTHING, WORSE = 1, 3
"""Exit statuses beside 0, and argparse's 2."""


def run(place: Path, *, step: int | None, as_json: bool, compare_with: Path | None, threshold: float) -> int:
    """Print the report on the run at `place`; returns the exit status."""
    summary = summarize(place)
    for problem in summary["problems"]:
        print(f"vgen report: {problem}", file=sys.stderr)
    if not summary["spans"]:
        print(f"vgen report: {place} holds no spans", file=sys.stderr)
        return NOTHING
    if step is not None:
        if all(one["step"] != step for one in summary["steps"]):
            print(f"vgen report: {place} holds no step {step}{_known(summary)}", file=sys.stderr)
            return NOTHING
        summary["why"] = explain(summary, step)
    changes = None
    if compare_with is not None:
        other = _other(compare_with)
        if other is None:
            return NOTHING
        changes = compare(other, summary, threshold)
        if not changes:
            print(f"vgen report: {place} and {compare_with} have no figure in common", file=sys.stderr)
            return NOTHING
    if as_json:
        if step is not None:
            summary["steps"] = [one for one in summary["steps"] if one["step"] == step]
        if changes is not None:
            summary["changes"] = [{**asdict(change), "percent": change.percent} for change in changes]
        print(json.dumps(summary))
    else:
        from rich.console import Console

        from .report import render, render_changes

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        console.print(render(summary, step))
        if changes is not None:
            console.print(render_changes(changes, str(compare_with), threshold))
    return WORSE if any(change.worse for change in changes or ()) else 0


def _known(summary: dict[str, Any]) -> str:
    numbers = [one["step"] for one in summary["steps"]]
    return f"; it has {min(numbers)} to {max(numbers)}" if numbers else ""


def _other(place: Path) -> dict[str, Any] | None:
    """The summary to compare with: read from a report's JSON, or made of a run."""
    if place.is_file() and place.suffix == ".json":
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
            compare(found, found, 0.0)
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        print(f"vgen report: {place} is not what `vgen report --json` prints", file=sys.stderr)
        return None
    found = summarize(place)
    for problem in found["problems"]:
        print(f"vgen report: {place}: {problem}", file=sys.stderr)
    if not found["spans"]:
        print(f"vgen report: {place} holds no spans to compare with", file=sys.stderr)
        return None
    return found
