"""A progress bar on standard error, for long calls."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET_SECONDS = 2.0
"""A call shows no bar before it has taken this long."""


@contextmanager
def progress_bar(total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the token count of each completion. Shows nothing if stderr is no terminal."""
    if not enabled or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), rate)
    progress, start, tokens = Progress(*columns, console=Console(stderr=True), transient=True), time.monotonic(), 0
    task, shown = progress.add_task("", total=total, rate=""), False

    def done(count: int) -> None:
        nonlocal tokens, shown
        tokens += count
        seconds = time.monotonic() - start
        if not shown and seconds > QUIET_SECONDS:
            progress.start()
            shown = True
        progress.update(task, advance=1, rate=f"{tokens / max(seconds, 1e-9):,.0f} tokens/s")

    try:
        yield done
    finally:
        if shown:
            progress.stop()
