"""A trace in a terminal: a tree of spans with bars."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..reader.run import SpanRecord, tree

_EIGHTHS = " ▏▎▍▌▋▊▉█"
MOST_INDENTED = 16
"""Levels of the tree that are indented."""
NARROW = 36
"""A terminal with fewer columns has no room for bars."""


def waterfall(spans: Sequence[SpanRecord], *, width: int = 100, title: str = "", now_ns: int = 0) -> Table:
    """One line for each span: its name, a bar where it lay in the trace, its duration.

    Open and failed spans are red. Open spans are drawn to `now_ns` (Unix nanoseconds). In fewer than `NARROW` columns
    there are no bars.
    """
    start = min(span.start_ns for span in spans)
    end = max(max(span.end_ns or span.start_ns for span in spans), start + 1, now_ns)
    rows = [(span, depth) for span, depth, _ in tree(spans)]
    several = len({span.process.key for span, depth in rows if depth == 0}) > 1
    names = max(len(_label(span, depth, several)) for span, depth in rows) + 2
    bar_width = max(10, width - min(names, width // 2) - 14)
    table = Table(
        title=title or None, box=None, padding=(0, 1, 0, 0), show_header=False, width=width, title_justify="left"
    )
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(width - 12 if width < NARROW else width // 2, 8))
    if width >= NARROW:
        table.add_column(no_wrap=True, width=bar_width)
    table.add_column(no_wrap=True, justify="right", width=10)
    for span, depth in rows:
        bad = span.error is not None or span.end_ns is None
        style = "red" if bad else "magenta" if span.rebuilt else ("cyan", "green", "yellow", "blue")[depth % 4]
        name = Text(_label(span, depth, several), style="red" if bad else "bold" if depth == 0 else "")
        last = span.end_ns if span.end_ns is not None else end
        bar = _bar(span.start_ns - start, last - start, end - start, bar_width)
        cells = [name, Text(bar, style=style), Text(_duration(span, now_ns), style="red" if bad else "")]
        table.add_row(*(cells if width >= NARROW else (cells[0], cells[2])))
    return table


def _label(span: SpanRecord, depth: int, several: bool) -> str:
    """The indented name, the error, and on a root the process if there are several."""
    process = f" [{span.process.label}]" if several and depth == 0 else ""
    failed = f" ✗ {span.error}" if span.error is not None else ""
    return "  " * min(depth, MOST_INDENTED) + span.name + process + failed


def _bar(start: int, end: int, total: int, width: int) -> str:
    """A bar from `start` to `end` of `total`. Its length is exact to an eighth of a cell, which is also the least."""
    eighths = max((end - start) * width * 8 // total, 1)
    cell = min(start * width // total, width - 1)
    whole, part = divmod(eighths, 8)
    return " " * cell + ("█" * whole + _EIGHTHS[part])[: width - cell].rstrip(" ")


def _duration(span: SpanRecord, now_ns: int) -> str:
    if span.end_ns is None:
        return f"{(now_ns - span.start_ns) / 1e9:.0f} s …" if now_ns > span.start_ns else "open"
    seconds = (span.end_ns - span.start_ns) / 1e9
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds:.2f} s"
