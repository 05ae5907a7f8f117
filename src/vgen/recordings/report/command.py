"""The command `vgen report`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..reader import untrusted
from .compare import Change, compare
from .figure_types import RunFigures, from_json, to_json
from .figures import summarize
from .verdict import explain

NOTHING, WORSE = 1, 3
"""Exit statuses besides 0, and argparse's 2."""
MOST_NESTED = 10
"""Levels of lists and dicts in a report's JSON."""


def run(place: Path, *, step: int | None, as_json: bool, compare_with: Path | None, threshold: float) -> int:
    """Print the report on the run at `place`. Returns the exit status."""
    figures = summarize(place)
    problem = _nothing(figures, step)
    for sentence in [*figures.problems, *([f"{place} {problem}"] if problem else [])]:
        print(f"vgen report: {sentence}", file=sys.stderr)
    if problem:
        return NOTHING
    changes: list[Change] = []
    if compare_with is not None:
        other = _other(compare_with)
        if other is None:
            return NOTHING
        changes = compare(other, figures, threshold)
        if not changes:
            print(f"vgen report: {place} and {compare_with} have no figure in common", file=sys.stderr)
            return NOTHING
    if as_json:
        print(_json(figures, step, changes))
    else:
        from rich.console import Console

        from .render import render, render_changes

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        console.print(render(figures, step))
        if changes:
            console.print(render_changes(changes, str(compare_with), threshold))
    return WORSE if any(change.worse for change in changes) else 0


def _nothing(figures: RunFigures, step: int | None) -> str | None:
    """Why there is nothing to report on; None if there is."""
    if not figures.spans:
        return "holds no spans"
    numbers = [one.step for one in figures.steps]
    if step is None or step in numbers:
        return None
    return f"holds no step {step}" + (f"; it has {min(numbers)} to {max(numbers)}" if numbers else "")


def _json(figures: RunFigures, step: int | None, changes: list[Change]) -> str:
    shown = to_json(figures)
    if step is not None:
        shown["steps"] = [one for one in figures.steps if one.step == step]
        shown["why"] = explain(figures, step)
    if changes:
        shown["changes"] = [{**to_json(change), "percent": change.percent} for change in changes]
    return json.dumps(shown, default=to_json)


def _other(place: Path) -> RunFigures | None:
    """The figures to compare with, from a report's JSON or from a run. Where there are none: a message, and None."""
    if place.is_file() and place.suffix == ".json":
        try:
            printed = untrusted.cleaned_value(json.loads(place.read_text(encoding="utf-8")), MOST_NESTED)
            figures = from_json(RunFigures, printed)
            compare(figures, figures, 0.0)  # finds values of a wrong type
            return figures
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            print(f"vgen report: {place} is not what `vgen report --json` prints", file=sys.stderr)
            return None
    figures = summarize(place)
    for problem in figures.problems:
        print(f"vgen report: {place}: {problem}", file=sys.stderr)
    if not figures.spans:
        print(f"vgen report: {place} holds no spans to compare with", file=sys.stderr)
        return None
    return figures
