"""A trace as a tree with bars, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from ..analysis.run import SpanRecord, children

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def waterfall(spans: Sequence[SpanRecord], *, width: int = 100, title: str = "") -> Table:
    """One line for each span: name, a bar where it lay in the trace, its duration. Open and failed ones in red."""
    begin = min(span.start_ns for span in spans)
    end = max(max(span.end_ns or span.start_ns for span in spans), begin + 1)
    tree = list(_walk(spans))
    names = max(len(span.name) + 2 * depth for span, depth in tree) + 2
    bar_width = max(10, width - min(names, width // 2) - 14)
    table = Table(
        title=title or None, box=None, padding=(0, 1, 0, 0), show_header=False, width=width, title_justify="left"
    )
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(12, width // 2))
    table.add_column(no_wrap=True, width=bar_width)
    table.add_column(no_wrap=True, justify="right", width=10)
    for span, depth in tree:
        bad = span.error is not None or span.end_ns is None
        style = "red" if bad else "magenta" if span.rebuilt else ("cyan", "green", "yellow", "blue")[depth % 4]
        name = Text("  " * depth + span.name, style="red" if bad else "bold" if depth == 0 else "")
        last = span.end_ns if span.end_ns is not None else end
        bar = _bar(span.start_ns - begin, last - begin, end - begin, bar_width)
        table.add_row(name, Text(bar, style=style), Text(_duration(span), style="red" if bad else ""))
    return table


def _walk(spans: Sequence[SpanRecord]) -> Iterator[tuple[SpanRecord, int]]:
    below = children(spans)
    stack = [(span, 0) for span in reversed(below.get(None, []))]
    while stack:
        span, depth = stack.pop()
        yield span, depth
        stack += [(child, depth + 1) for child in reversed(below.get(span.span_id, []))]


def _bar(start: int, end: int, total: int, width: int) -> str:
    """A bar from `start` to `end` of `total`, to an eighth of a cell, never narrower than that."""
    eighths = max((end - start) * width * 8 // total, 1)
    cell = min(start * width // total, width - 1)
    whole, part = divmod(eighths, 8)
    return " " * cell + ("█" * whole + _EIGHTHS[part])[: width - cell].rstrip(" ")


def _duration(span: SpanRecord) -> str:
    if span.end_ns is None:
        return "open"
    seconds = (span.end_ns - span.start_ns) / 1e9
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds:.2f} s"
