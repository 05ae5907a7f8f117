"""A trace as one HTML file that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from ..analysis.run import SpanRecord, children
from ..analysis.select import Selection

DIGITS = 6
"""Significant digits of floats in attributes. Times are whole nanoseconds."""


def export(chosen: Selection) -> str:
    """The page. Whatever the spans hold is data in it, never markup or script."""
    template = Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    data = json.dumps(_data(chosen), separators=(",", ":"), ensure_ascii=False)
    # JSON needs no `<` outside of strings: escaped there, nothing in it can end the script element
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    head, _, rest = template.partition("{{title}}")
    middle, _, tail = rest.partition("{{data}}")
    return head + html.escape(f"vgen: {chosen.title}") + middle + data + tail


def _data(chosen: Selection) -> dict[str, Any]:
    """Spans in the order of the tree, each `[name, row of its parent, start, duration, flags, attributes, more]`.

    Names and attributes' keys are numbers in tables, and what a span has inherited is not repeated.
    """
    rows = _tree(chosen.spans)
    begin = min((span.start_ns for span, _ in rows), default=0)
    names: dict[str, int] = {}
    keys: dict[str, int] = {}
    spans: list[list[Any]] = []
    for span, parent in rows:
        end = max(chosen.end_ns if span.end_ns is None else span.end_ns, span.start_ns)
        above = rows[parent][0].attributes if parent >= 0 else {}
        own: list[Any] = []
        for key, value in span.attributes.items():
            if key not in above or above[key] != value:
                own += [keys.setdefault(key, len(keys)), _short(value)]
        flags = (span.error is not None) | (span.end_ns is None) << 1 | span.rebuilt << 2
        more = _more(span, begin)
        name = names.setdefault(span.name, len(names))
        row = [name, parent, span.start_ns - begin, end - span.start_ns, flags, own, more]
        while len(row) > 2 and not row[-1]:
            row.pop()
        spans.append(row)
    return {
        "title": chosen.title,
        "begin": begin / 1e6,
        "names": list(names),
        "keys": list(keys),
        "problems": chosen.problems,
        "spans": spans,
    }


def _tree(spans: list[SpanRecord]) -> list[tuple[SpanRecord, int]]:
    """Depth first, each with the row of its parent or -1."""
    below = children(spans)
    rows: list[tuple[SpanRecord, int]] = []
    stack = [(span, -1) for span in reversed(below.get(None, []))]
    while stack:
        span, parent = stack.pop()
        rows.append((span, parent))
        stack += [(child, len(rows) - 1) for child in reversed(below.get(span.span_id, []))]
    return rows


def _more(span: SpanRecord, begin: int) -> dict[str, Any]:
    """What few spans have."""
    shift = 0 if span.process is None else span.process.shift_ns
    found: dict[str, Any] = {}
    if span.error is not None:
        found["error"] = span.error
    if span.parent_id is None and span.process is not None:
        found["process"] = span.process.label
    events = [
        [event["unix_ns"] + shift - begin, str(event.get("name")), event.get("attributes") or {}]
        for event in span.events
        if isinstance(event.get("unix_ns"), int)
    ]
    if events:
        found["events"] = events
    if span.links:
        found["links"] = [link.get("span_id") for link in span.links]
    return found


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
