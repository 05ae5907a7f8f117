"""The command `vgen trace`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from ..reader.selection import select

TERMINAL_SPANS, FILE_SPANS = 300, 50_000
"""The most spans that a terminal and a file show. Of more, the shortest are left out."""


def run(place: Path, *, step: int | None, files: dict[str, Path], follow: bool) -> int:
    """Show a trace of the run at `place`, or write it into `files`, which maps formats to paths.

    A format is the name of a module in this folder. Returns the exit status.
    """
    if follow:
        from .follow import follow as follow_run

        return follow_run(place, step)
    chosen = select(place, step, FILE_SPANS if files else TERMINAL_SPANS)
    for problem in chosen.problems:
        print(f"vgen trace: {problem}", file=sys.stderr)
    if not chosen.spans:
        print(f"vgen trace: {place} holds no {'spans' if step is None else f'step {step}'}", file=sys.stderr)
        return 1
    for form, file in files.items():
        try:
            exporter = importlib.import_module(f"..{form}", __name__)
            file.write_text(exporter.export(chosen), encoding="utf-8")
        except OSError as error:
            print(f"vgen trace: cannot write {file}: {error.strerror}", file=sys.stderr)
            return 2
    if not files:
        from rich.console import Console

        from .terminal import waterfall

        console = Console(highlight=False)
        console.print(waterfall(chosen.spans, width=min(console.width, 120), now_ns=chosen.end_ns))
    return 0
