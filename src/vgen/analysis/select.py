"""The spans of one step or trace out of a run of any size."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..profiling import names
from . import clocks
from .run import Process, SpanRecord, as_span, lines, parse, thin

# In the writer's own lines, which may be told apart without parsing them; others are parsed.
_TRACE = re.compile(r'\{"type":"(?:end|start)","name":"[^"\\]*","trace_id":"([0-9a-f]{32})"').match
_START = re.compile(r'"start_unix_ns":(\d+)').search
_CLOSE = f'"name":"{names.ENGINE_CLOSE}"'
_SPAN = ('{"type":"end"', '{"type":"start"')


@dataclass(slots=True)
class Selection:
    """Spans to be shown, in the order of their starts, their times on the run's clock."""

    spans: list[SpanRecord]
    title: str
    problems: list[str] = field(default_factory=list[str])
    """What could not be read or shown, a sentence each."""
    end_ns: int = 0
    """The last moment that is known: where spans that never ended are drawn to."""


def select(place: str | Path, step: int | None = None, most: int = 1 << 60) -> Selection:
    """The traces of the step of that number, of all ranks; or the run's last trace where None, an engine's end aside.

    Of more than `most` spans the shortest are left out, which keeps those that hold others. Reads the
    files twice and keeps only what is asked for.
    """
    problems: list[str] = []
    wanted = _traces(place, step)
    chosen = Selection([], f"step {step}" if step is not None else "last trace", problems)
    kept: dict[str, SpanRecord] = {}
    left_out = 0
    processes: dict[str, Process] = {}
    for process, line in lines(place, problems):
        if line.startswith(_SPAN):
            found = _TRACE(line)
            if found is not None and found[1] not in wanted:
                continue
        elif line.startswith('{"type":"'):
            continue
        try:
            record = parse(line)
        except ValueError:
            process.unread += 1
            continue
        if record["type"] not in ("start", "end") or record["trace_id"] not in wanted:
            continue
        span = as_span(record, process)
        processes[process.key] = process
        process.last_ns = max(process.last_ns, span.start_ns, span.end_ns or 0)
        rank = span.attributes.get(names.RANK)
        if process.rank is None and type(rank) is int:
            process.rank = rank
        if span.end_ns is not None or span.span_id not in kept:
            kept[span.span_id] = span
        if len(kept) >= 2 * most:
            left_out += thin(kept, most)
    if len(kept) > most:
        left_out += thin(kept, most)
    if left_out:
        problems.append(f"{left_out:,} of {left_out + len(kept):,} spans are not shown: the shortest")
    problems += clocks.align(_witnesses(kept, processes))
    for span in kept.values():
        shift = span.process.shift_ns if span.process is not None else 0
        span.start_ns += shift
        span.end_ns = None if span.end_ns is None else span.end_ns + shift
    chosen.spans = sorted(kept.values(), key=lambda span: (span.start_ns, -(span.end_ns or 1 << 62)))
    chosen.end_ns = max((process.last_ns + process.shift_ns for process in processes.values()), default=0)
    chosen.spans = _latest(chosen.spans, problems)
    opened = sum(span.end_ns is None for span in chosen.spans)
    if opened:
        problems.append(f"{opened} span{'s' * (opened > 1)} never ended: drawn to the last moment that was recorded")
    return chosen


def _traces(place: str | Path, step: int | None) -> set[str]:
    """The ids of the traces that are asked for."""
    mark = f'"{names.STEP_NUMBER}":{step}'
    wanted: set[str] = set()
    latest = -1
    for _, line in lines(place, []):
        if not line.startswith(_SPAN) and line.startswith('{"type":"'):
            continue
        found = _TRACE(line)
        if step is not None and found is not None:
            if mark in line and f'"name":"{names.STEP}"' in line and _numbered(line, step):
                wanted.add(found[1])
            continue
        start = _START(line)
        if found is not None and start is not None:
            if int(start[1]) > latest and (latest < 0 or _CLOSE not in line):
                latest, wanted = int(start[1]), {found[1]}
            continue
        try:
            record = parse(line)
        except ValueError:
            continue
        if record["type"] not in ("start", "end"):
            continue
        if step is not None:
            if record["attributes"].get(names.STEP_NUMBER) == step:
                wanted.add(record["trace_id"])
        elif record["start_unix_ns"] > latest:
            latest, wanted = record["start_unix_ns"], {record["trace_id"]}
    return wanted


def _numbered(line: str, step: int) -> bool:
    try:
        return parse(line)["attributes"].get(names.STEP_NUMBER) == step
    except ValueError:
        return False


def _latest(spans: list[SpanRecord], problems: list[str]) -> list[SpanRecord]:
    """Of a step that was recorded twice, as when a run is started again in its directory, the later one."""
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    for span in spans:
        begins.setdefault(span.trace_id, span.start_ns)
        ends[span.trace_id] = max(ends.get(span.trace_id, 0), span.end_ns or span.start_ns)
    if len(begins) < 2:
        return spans
    last = max(begins.values())
    kept = {trace for trace in begins if ends[trace] > last or begins[trace] == last}
    if len(kept) < len(begins):
        problems.append("the step was recorded more than once: the last time is shown")
    return [span for span in spans if span.trace_id in kept]


def _witnesses(kept: dict[str, SpanRecord], processes: dict[str, Process]) -> list[clocks.Witness]:
    found = {key: clocks.Witness(process) for key, process in processes.items()}

    def times(span: SpanRecord, process: Process) -> tuple[int, int]:
        return span.start_ns, process.last_ns if span.end_ns is None else span.end_ns

    for span in kept.values():
        if span.process is None:
            continue
        own = found[span.process.key]
        number = span.attributes.get(names.STEP_NUMBER)
        if span.name == names.STEP and type(number) is int:
            own.steps[number] = times(span, span.process)
        parent = kept.get(span.parent_id or "")
        if parent is not None and parent.process is not None and parent.process is not span.process:
            own.parents.append((parent.process, times(parent, parent.process), times(span, span.process)))
    return list(found.values())
