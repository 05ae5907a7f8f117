"""A trace as one HTML file that needs no network, no server and no other file."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from ..reader.run import SpanRecord, tree
from ..reader.selection import Selection

DIGITS = 6
"""Significant digits of floats in attributes. Times are whole nanoseconds."""


def export(chosen: Selection) -> str:
    """The page: the template `trace.html` with the spans as JSON in it. No text of a span becomes markup or script."""
    template = Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    data = json.dumps(_data(chosen), separators=(",", ":"), ensure_ascii=False)
    # JSON needs `<` only inside strings. With each one escaped there, nothing in the data can end the script element.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    head, _, rest = template.partition("{{title}}")
    middle, _, tail = rest.partition("{{data}}")
    return head + html.escape(f"vgen: {chosen.title}") + middle + data + tail


def _data(chosen: Selection) -> dict[str, Any]:
    """Spans in the order of the tree, each `[name, row of its parent, start, duration, flags, attributes, more]`.

    To keep the page small, names and the keys of attributes are positions in lists, an attribute that the parent has
    too is left out, and so are empty values at the end of a row.
    """
    spans = [(span, parent) for span, _, parent in tree(chosen.spans)]
    start_ns = min((span.start_ns for span, _ in spans), default=0)
    names: dict[str, int] = {}
    keys: dict[str, int] = {}
    rows: list[list[Any]] = []
    for span, parent in spans:
        inherited = spans[parent][0].attributes if parent >= 0 else {}
        attributes: list[Any] = []
        for key, value in span.attributes.items():
            if key not in inherited or inherited[key] != value:
                attributes += [keys.setdefault(key, len(keys)), _short(value)]
        flags = (span.error is not None) | (span.end_ns is None) << 1 | span.rebuilt << 2
        times = span.start_ns - start_ns, span.end(chosen.end_ns) - span.start_ns
        name = names.setdefault(span.name, len(names))
        row = [name, parent, *times, flags, attributes, _rare(span, start_ns)]
        while len(row) > 2 and not row[-1]:
            row.pop()
        rows.append(row)
    lists = {"names": list(names), "keys": list(keys), "problems": chosen.problems, "spans": rows}
    return {"title": chosen.title, "begin": start_ns / 1e6, **lists}


def _rare(span: SpanRecord, start_ns: int) -> dict[str, Any]:
    """What few spans have."""
    rare = {
        "error": span.error,
        "process": span.process.label if span.parent_id is None else None,
        "events": [[event["unix_ns"] - start_ns, event["name"], event["attributes"]] for event in span.events],
        "links": [link["span_id"] for link in span.links],
    }
    return {key: value for key, value in rare.items() if value}


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
