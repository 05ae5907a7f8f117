"""A recorded run, read back from its JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class SpanRecord:
    """One span as it was recorded. `end_ns` is None for one that never ended; times are Unix nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int | None
    attributes: dict[str, Any]
    error: str | None = None
    rebuilt: bool = False
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    links: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


@dataclass(slots=True)
class Run:
    """The spans, measurements and rows of all processes that wrote into one directory."""

    spans: list[SpanRecord]
    """In the order of their starts."""
    measurements: list[dict[str, Any]]
    rows: list[tuple[int, dict[str, float]]]
    """Step number and summary, in the order of their ends."""
    problems: list[str]
    """What could not be read, a sentence each."""

    def traces(self) -> list[list[SpanRecord]]:
        """The spans of each trace, traces in the order of their first spans."""
        found: dict[str, list[SpanRecord]] = {}
        for span in self.spans:
            found.setdefault(span.trace_id, []).append(span)
        return list(found.values())

    def step(self, number: int) -> list[SpanRecord]:
        """The trace that holds the step of that number; empty when there is none."""
        for trace in self.traces():
            if any(span.attributes.get("vgen.step") == number for span in trace):
                return trace
        return []


def read_run(directory: str | Path) -> Run:
    """Read every `*.jsonl` file below `directory`, or that one file. Lines that cannot be read become `problems`."""
    place = Path(directory)
    files = [place] if place.is_file() else sorted(place.glob("**/*.jsonl"))
    run = Run([], [], [], [] if files else [f"no record (*.jsonl) in {place}"])
    started: dict[str, SpanRecord] = {}
    ended: dict[str, SpanRecord] = {}
    for file in files:
        for record in _records(file, run.problems):
            kind = record.get("type")
            if kind in ("start", "end"):
                span = _span(record)
                (ended if kind == "end" else started)[span.span_id] = span
            elif kind == "measurement":
                run.measurements.append(record)
            elif kind == "step":
                run.rows.append((record["number"], record["summary"]))
            elif kind == "header" and record.get("format", 0) > 1:
                run.problems.append(f"{file.name} is of a newer vgen ({record.get('vgen')}): read as far as known")
    run.spans = sorted((started | ended).values(), key=lambda span: span.start_ns)
    return run


def _records(file: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    unread = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                if record.get("type") in ("start", "end"):
                    _span(record)
                yield record
            except (ValueError, KeyError, TypeError, AttributeError):
                unread += 1
    if unread:
        problems.append(f"{file.name}: {unread} line{'s' * (unread > 1)} cut off or damaged")


def _span(record: dict[str, Any]) -> SpanRecord:
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
        record.get("events", []),
        record.get("links", []),
    )


def children(spans: Iterable[SpanRecord]) -> dict[str | None, list[SpanRecord]]:
    """Spans by the id of their parent; under None those whose parent is not among them."""
    known = {span.span_id: span for span in spans}
    found: dict[str | None, list[SpanRecord]] = {}
    for span in sorted(known.values(), key=lambda span: span.start_ns):
        found.setdefault(span.parent_id if span.parent_id in known else None, []).append(span)
    return found
