"""A trace in Chrome's trace event format, which https://ui.perfetto.dev and chrome://tracing open.

The format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. The
slices of one track must contain each other or be apart, so spans that overlap, such as requests, get tracks of their
own.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from typing import Any

from ..reader.run import SpanRecord, by_process
from ..reader.selection import Selection


def export(chosen: Selection) -> str:
    """The trace as JSON: complete events (`ph` X) in microseconds since the start of the first one."""
    start_ns = min((span.start_ns for span in chosen.spans), default=0)
    events: list[dict[str, Any]] = []
    pids: set[int] = set()
    for number, spans in enumerate(by_process(chosen.spans), 1):
        process = spans[0].process
        # Two hosts may have the same process number. Numbers above 2**20 are beyond what Linux gives out by default.
        pid = (1 << 20) + number if process.pid in pids else process.pid or number
        pids.add(pid)
        label = f"{process.label} on {process.host}" if process.host else "vgen"
        events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": label}})
        for span, track in zip(spans, tracks(spans, chosen.end_ns), strict=True):
            events += _events(span, {"pid": pid, "tid": track + 1}, start_ns, chosen.end_ns)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def tracks(spans: Sequence[SpanRecord], end_ns: int) -> list[int]:
    """The track of each span, from 0. Spans on one track are nested or do not overlap.

    `spans` are in the order of their starts. A span gets the track of its parent if it fits there.
    """
    stacks: list[list[int]] = []
    """By track, the ends of the spans that are open, the innermost last."""
    track_ends: list[tuple[int, int]] = []
    """When a track will be empty, and which track: a heap."""
    track_by_span_id: dict[str, int] = {}
    track_of_span: list[int] = []
    for span in spans:
        start, end = span.start_ns, span.end(end_ns)
        track = track_by_span_id.get(span.parent_id or "")
        if track is None or not _fits(stacks[track], start, end):
            track = len(stacks)
            while track_ends and track_ends[0][0] <= start:
                _, candidate = heapq.heappop(track_ends)
                if _fits(stacks[candidate], start, 1 << 63):  # empty, unless a child has taken it meanwhile
                    track = candidate
                    break
            if track == len(stacks):
                stacks.append([])
        if not stacks[track]:
            heapq.heappush(track_ends, (end, track))
        stacks[track].append(end)
        track_by_span_id[span.span_id] = track
        track_of_span.append(track)
    return track_of_span


def _fits(stack: list[int], start: int, end: int) -> bool:
    """Whether a span fits on a track: first drops spans that ended before `start`."""
    while stack and stack[-1] <= start:
        stack.pop()
    return not stack or end <= stack[-1]


def _events(span: SpanRecord, track: dict[str, int], start_ns: int, end_ns: int) -> list[dict[str, Any]]:
    """The slice of a span, and an instant event (`ph` i) for each of its events."""
    category = span.name.partition(".")[0]
    arguments = {**span.attributes, "span_id": span.span_id, "trace_id": span.trace_id}
    arguments |= {"error": span.error} if span.error is not None else {}
    arguments |= {"unended": True} if span.end_ns is None else {}
    times = {"ts": (span.start_ns - start_ns) / 1e3, "dur": (span.end(end_ns) - span.start_ns) / 1e3}
    kind = {"cat": "error" if span.error is not None else category, "ph": "X"}
    events = [{"name": span.name, **kind, **times, **track, "args": arguments}]
    for event in span.events:
        event_position = {"ts": (event["unix_ns"] - start_ns) / 1e3, **track}
        instant = {"name": event["name"], "ph": "i", "s": "t", "cat": category}
        events.append({**instant, **event_position, "args": event["attributes"]})
    return events
