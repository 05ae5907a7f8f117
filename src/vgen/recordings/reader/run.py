"""The spans of a run as objects: read from records, grouped, and put into a tree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...profiling import recording_format
from .processes import Process


@dataclass(slots=True)
class SpanRecord:
    """One span of a recorded run. Times are Unix nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int | None
    """None for a span that never ended."""
    attributes: dict[str, Any]
    error: str | None = None
    """The type of the exception that ended it."""
    rebuilt: bool = False
    """Whether it was made after the fact, from the engine's timings."""
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Each with `name` (str), `unix_ns` (int) and `attributes` (dict)."""
    links: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Each with `trace_id` (str), `span_id` (str) and `attributes` (dict)."""
    process: Process = field(default_factory=lambda: Process(""))

    def end(self, now_ns: int) -> int:
        """When it ended; for a span that never ended, `now_ns`. Never before the start."""
        return max(now_ns if self.end_ns is None else self.end_ns, self.start_ns)

    def shift(self, by_ns: int) -> None:
        """Move all its times."""
        self.start_ns += by_ns
        self.end_ns = None if self.end_ns is None else self.end_ns + by_ns
        for event in self.events:
            event["unix_ns"] += by_ns


def parse_span(line: str, process: Process) -> SpanRecord | None:
    """The span on a line. None for any other line, and for a damaged one, which `process` counts."""
    record = process.parse(line) if recording_format.may_be_span(line) else None
    return as_span(record, process) if record is not None and record["type"] in ("start", "end") else None


def as_span(record: dict[str, Any], process: Process) -> SpanRecord:
    """The span of a `start` or `end` record that `Process.parse` returned."""
    return SpanRecord(
        record["name"],
        record["trace_id"],
        record["span_id"],
        record.get("parent_id"),
        record["start_unix_ns"],
        record.get("end_unix_ns"),
        record["attributes"],
        record.get("error"),
        record.get("current") is False,
        [
            {"name": str(event.get("name")), "unix_ns": event["unix_ns"], "attributes": _dict(event.get("attributes"))}
            for event in _dicts(record.get("events"))
            if type(event.get("unix_ns")) is int
        ],
        [
            {key: str(link.get(key)) for key in ("trace_id", "span_id")} | {"attributes": _dict(link.get("attributes"))}
            for link in _dicts(record.get("links"))
        ],
        process,
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []  # pyright: ignore


def grouped(spans: Iterable[SpanRecord], key: Callable[[SpanRecord], str]) -> list[list[SpanRecord]]:
    """The spans with the same key together, groups in the order of their first spans."""
    groups: dict[str, list[SpanRecord]] = {}
    for span in spans:
        groups.setdefault(key(span), []).append(span)
    return list(groups.values())


def by_process(spans: Iterable[SpanRecord]) -> list[list[SpanRecord]]:
    """The spans of each process."""
    return grouped(spans, lambda span: span.process.key)


def tree(spans: Iterable[SpanRecord]) -> Iterator[tuple[SpanRecord, int, int]]:
    """The spans depth first, children in the order of their starts: span, depth, and the position of its parent.

    The position counts what was yielded before, from 0. It is -1, and the depth 0, for a span whose parent is not among
    `spans`. Of spans that are ancestors of each other, the first is shown as if its parent were missing.
    """
    below = children(spans)
    waiting = {span.span_id: span for group in below.values() for span in group}
    stack = [(span, 0, -1) for span in reversed(below.get(None, []))]
    for position in itertools.count():
        if not stack and waiting:
            stack.append((next(iter(waiting.values())), 0, -1))
        if not stack:
            return
        span, depth, parent = stack.pop()
        del waiting[span.span_id]
        yield span, depth, parent
        below_it = [child for child in reversed(below.get(span.span_id, [])) if child.span_id in waiting]
        stack += [(child, depth + 1, position) for child in below_it]


def children(spans: Iterable[SpanRecord]) -> dict[str | None, list[SpanRecord]]:
    """Spans by the ID of their parent, in the order of their starts; under None, those whose parent is missing."""
    known = {span.span_id: span for span in spans}
    below: dict[str | None, list[SpanRecord]] = {}
    for span in sorted(known.values(), key=lambda span: span.start_ns):
        below.setdefault(span.parent_id if span.parent_id in known else None, []).append(span)
    return below


def thin(spans: dict[str, SpanRecord], most: int) -> int:
    """Delete the shortest spans until `most` are left. Returns how many were deleted.

    Spans that never ended, and then failed ones, count as the longest. A span is never deleted before its children,
    because it is at least as long as they are.
    """

    def weight(span: SpanRecord) -> tuple[bool, bool, int]:
        return span.end_ns is None, span.error is not None, (span.end_ns or 0) - span.start_ns

    shortest = sorted(spans.values(), key=weight)[: max(len(spans) - most, 0)]
    for span in shortest:
        del spans[span.span_id]
    return len(shortest)
