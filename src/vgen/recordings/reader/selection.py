"""The spans of one step or trace, out of a run of any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...profiling import recording_format, semconv
from . import clocks
from .processes import Process, lines
from .run import SpanRecord, parse_span, thin


@dataclass(slots=True)
class Selection:
    """Spans to show, in the order of their starts. Their times are Unix nanoseconds on the clock of the run."""

    spans: list[SpanRecord]
    title: str
    problems: list[str] = field(default_factory=list[str])
    """What could not be read or shown, one sentence each."""
    end_ns: int = 0
    """The last time that was recorded. Spans that never ended are drawn to it."""


def select(place: str | Path, step: int | None = None, most: int = 1 << 60) -> Selection:
    """The traces of the step with this number, of all ranks. With None: the run's last trace.

    The last trace is the one that started last; the trace of an engine's shutdown counts only if there is no other.
    Of more than `most` spans, the shortest are left out, which keeps the parents of those that are shown. Reads the
    files twice, and keeps only the spans of these traces in memory.
    """
    problems: list[str] = []
    spans, processes, left_out = _read(place, _trace_ids(place, step), most, problems)
    if left_out:
        problems.append(f"{left_out:,} of {left_out + len(spans):,} spans are not shown: the shortest")
    problems += clocks.align(processes, _observations(spans))
    for span in spans.values():
        span.shift(span.process.shift_ns)
    chosen = sorted(spans.values(), key=lambda span: (span.start_ns, -(span.end_ns or 1 << 62)))
    chosen = _last_recorded(chosen, problems)
    unended = sum(span.end_ns is None for span in chosen)
    if unended:
        problems.append(f"{unended} span{'s' * (unended > 1)} never ended: drawn to the last moment that was recorded")
    end_ns = max((process.last_ns + process.shift_ns for process in processes), default=0)
    return Selection(chosen, f"step {step}" if step is not None else "last trace", problems, end_ns)


def _trace_ids(place: str | Path, step: int | None) -> set[str]:
    """The IDs of the traces that are asked for."""
    trace_ids: set[str] = set()
    latest = -1
    for process, line in lines(place, []):
        head = recording_format.span_head(line)
        if head is not None:
            name, trace_id, _, _, start_ns, _, number = head
        elif (span := parse_span(line, process)) is not None:
            name, trace_id, start_ns, number = span.name, span.trace_id, span.start_ns, _number(span)
        else:
            continue
        if step is not None:
            if number == step and name == semconv.STEP:
                trace_ids.add(trace_id)
        elif start_ns > latest and (latest < 0 or name != semconv.ENGINE_CLOSE):
            latest, trace_ids = start_ns, {trace_id}
    return trace_ids


def _number(span: SpanRecord) -> Any:
    return span.attributes.get(semconv.STEP_NUMBER)


def _read(
    place: str | Path, trace_ids: set[str], most: int, problems: list[str]
) -> tuple[dict[str, SpanRecord], list[Process], int]:
    """The spans of some traces by ID, the processes that recorded them, and how many spans were left out."""
    spans: dict[str, SpanRecord] = {}
    processes: dict[str, Process] = {}
    left_out = 0
    for process, line in lines(place, problems):
        head = recording_format.span_head(line)
        if head is not None and head[1] not in trace_ids:
            continue
        span = parse_span(line, process)
        if span is None or span.trace_id not in trace_ids:
            continue
        processes[process.key] = process
        process.last_ns = max(process.last_ns, span.start_ns, span.end_ns or 0)
        process.take_rank(span.attributes)
        if span.end_ns is not None or span.span_id not in spans:
            spans[span.span_id] = span
        if len(spans) >= 2 * most:
            left_out += thin(spans, most)
    return spans, list(processes.values()), left_out + thin(spans, most)


def _last_recorded(spans: list[SpanRecord], problems: list[str]) -> list[SpanRecord]:
    """Of a step that was recorded more than once, as when a run is started again in its directory, the last time."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for span in spans:
        starts.setdefault(span.trace_id, span.start_ns)
        ends[span.trace_id] = max(ends.get(span.trace_id, 0), span.end_ns or span.start_ns)
    last = max(starts.values(), default=0)
    shown = {trace_id for trace_id in starts if ends[trace_id] > last or starts[trace_id] == last}
    if len(shown) < len(starts):
        problems.append("the step was recorded more than once: the last time is shown")
    return [span for span in spans if span.trace_id in shown]


def _observations(spans: dict[str, SpanRecord]) -> Iterator[clocks.Observation]:
    def times(span: SpanRecord) -> clocks.Times:
        return span.start_ns, span.process.last_ns if span.end_ns is None else span.end_ns

    for span in spans.values():
        number, parent = _number(span), spans.get(span.parent_id or "")
        step = number if span.name == semconv.STEP and type(number) is int else None
        above = None if parent is None else (parent.process, times(parent))
        yield clocks.Observation(span.process, times(span), step, above)
