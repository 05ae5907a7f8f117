"""Chrome's trace event format: https://ui.perfetto.dev and chrome://tracing open it.

Slices of one track must lie within each other, so spans that overlap, such as requests, get tracks of their own.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from typing import Any

from ..analysis.run import SpanRecord
from ..analysis.select import Selection


def export(chosen: Selection) -> str:
    """The trace as JSON: complete events (`ph` X) in microseconds since the first one's start."""
    begin = min((span.start_ns for span in chosen.spans), default=0)
    events: list[dict[str, Any]] = []
    by_process: dict[str, list[SpanRecord]] = {}
    for span in chosen.spans:
        by_process.setdefault("" if span.process is None else span.process.key, []).append(span)
    for number, spans in enumerate(by_process.values(), 1):
        process = spans[0].process
        pid = process.pid if process is not None and isinstance(process.pid, int) else number
        if any(event["pid"] == pid for event in events):
            pid = (1 << 20) + number  # the same number on another host
        label = "vgen" if process is None else f"{process.label} on {process.host}"
        events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": label}})
        for span, lane in zip(spans, lanes(spans, chosen.end_ns), strict=True):
            events += _events(span, lane, pid, begin, chosen.end_ns)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def lanes(spans: Sequence[SpanRecord], end_ns: int) -> list[int]:
    """For each span, in the order of their starts, a track on which it lies within what is open there, or alone."""
    stacks: list[list[int]] = []
    """By track, the ends of what is open, the innermost last."""
    free: list[tuple[int, int]] = []
    """When a track will be empty, and which: a heap."""
    lane_of: dict[str, int] = {}
    found: list[int] = []
    for span in spans:
        start, end = span.start_ns, max(end_ns if span.end_ns is None else span.end_ns, span.start_ns)
        lane = lane_of.get(span.parent_id or "")
        if lane is None or not _fits(stacks[lane], start, end):
            lane = len(stacks)
            while free and free[0][0] <= start:
                _, candidate = heapq.heappop(free)
                if _fits(stacks[candidate], start, 1 << 63):  # empty, unless a child has taken it meanwhile
                    lane = candidate
                    break
            if lane == len(stacks):
                stacks.append([])
        if not stacks[lane]:
            heapq.heappush(free, (end, lane))
        stacks[lane].append(end)
        lane_of[span.span_id] = lane
        found.append(lane)
    return found


def _fits(stack: list[int], start: int, end: int) -> bool:
    while stack and stack[-1] <= start:
        stack.pop()
    return not stack or end <= stack[-1]


def _events(span: SpanRecord, lane: int, pid: int, begin: int, end_ns: int) -> list[dict[str, Any]]:
    end = max(end_ns if span.end_ns is None else span.end_ns, span.start_ns)
    own = dict(span.attributes)
    own |= {"span_id": span.span_id, "trace_id": span.trace_id}
    own |= {"error": span.error} if span.error is not None else {}
    own |= {"unended": True} if span.end_ns is None else {}
    category = span.name.partition(".")[0]
    found: list[dict[str, Any]] = [
        {
            "name": span.name,
            "cat": "error" if span.error is not None else category,
            "ph": "X",
            "ts": (span.start_ns - begin) / 1e3,
            "dur": (end - span.start_ns) / 1e3,
            "pid": pid,
            "tid": lane + 1,
            "args": own,
        }
    ]
    for event in span.events:
        time = event.get("unix_ns")
        if isinstance(time, int):
            shift = 0 if span.process is None else span.process.shift_ns
            at = {"ts": (time + shift - begin) / 1e3, "pid": pid, "tid": lane + 1}
            args = event.get("attributes") or {}
            found.append({"name": str(event.get("name")), "ph": "i", "s": "t", "cat": category, **at, "args": args})
    return found
