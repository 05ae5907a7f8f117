"""A recorded run, read back from its JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..profiling import names

FORMAT = 1
"""The newest format that is known here."""


@dataclass(slots=True)
class Process:
    """One process that wrote into the run."""

    key: str
    """What the names of its files have in common."""
    host: str = ""
    pid: int | None = None
    vgen: str = ""
    rank: int | None = None
    last_ns: int = 0
    """The latest time in its files, on its own clock."""
    shift_ns: int = 0
    """What its clock lacks to agree with the others: added to a time of its own, it gives the run's time."""
    twin: bool = False
    """Whether another process of the run has the same rank, as after a restart into the same directory."""
    first_part: int = 0
    """Which of its files is the first that is left: more than 0 where `max_parts` had earlier ones deleted."""
    unread: int = 0
    """Lines of the file that is being read which made no sense: whoever reads counts them here."""

    @property
    def label(self) -> str:
        """Such as `rank 3`, or host and number where that does not tell it apart."""
        place = f"{self.host}:{self.pid}" if self.host else self.key
        return place if self.rank is None else f"rank {self.rank} ({place})" if self.twin else f"rank {self.rank}"


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
    process: Process | None = None


@dataclass(slots=True)
class Run:
    """The spans, measurements and rows of all processes that wrote into one directory, all of it in memory."""

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
            if any(span.attributes.get(names.STEP_NUMBER) == number for span in trace):
                return trace
        return []


def read_run(place: str | Path) -> Run:
    """Read every `*.jsonl` file below a directory, or that one file. Lines that cannot be read become `problems`."""
    run = Run([], [], [], [])
    started: dict[str, SpanRecord] = {}
    ended: dict[str, SpanRecord] = {}
    for process, record in records(place, run.problems):
        kind = record["type"]
        if kind in ("start", "end"):
            (ended if kind == "end" else started)[record["span_id"]] = as_span(record, process)
        elif kind == "measurement":
            run.measurements.append(record)
        elif kind == "step":
            run.rows.append((record["number"], record["summary"]))
    run.spans = sorted((started | ended).values(), key=lambda span: span.start_ns)
    return run


def files(place: str | Path) -> list[Path]:
    """The record's files: those below a directory in the order of their names, or the one that `place` is."""
    found = Path(place)
    return [found] if found.is_file() else sorted(file for file in found.glob("**/*.jsonl") if file.is_file())


def records(place: str | Path, problems: list[str]) -> Iterator[tuple[Process, dict[str, Any]]]:
    """Every record of a run that can be read, one process after the other."""
    for process, line in lines(place, problems):
        try:
            record = parse(line)
        except ValueError:
            process.unread += 1
            continue
        yield process, record


def lines(place: str | Path, problems: list[str]) -> Iterator[tuple[Process, str]]:
    """Every line of a run but the headers, unparsed. What could not be read is told in `problems` at a file's end."""
    found = files(place)
    if not found:
        problems.append(f"no record (*.jsonl) in {place}" if Path(place).exists() else f"{place} does not exist")
    process = Process("")
    for file in found:
        key = file.stem.rpartition("-")[0] or file.stem
        if process.key != key:
            process = Process(key)
        try:
            with file.open(encoding="utf-8", errors="replace") as content:
                for line in content:
                    if line.startswith('{"type":"header"'):
                        _header(line, file, process, problems)
                    else:
                        yield process, line
        except OSError as error:
            problems.append(f"{file.name} cannot be read: {error.strerror}")
        if process.unread:
            problems.append(f"{file.name}: {process.unread} line{'s' * (process.unread > 1)} cut off or damaged")
            process.unread = 0


def _header(line: str, file: Path, process: Process, problems: list[str]) -> None:
    try:
        header = json.loads(line)
        form, part = int(header["format"]), int(header.get("part", 0))
        first = not process.host
        process.host, process.pid = str(header.get("host", "")), header.get("pid")
        process.vgen = str(header.get("vgen", ""))
    except (ValueError, KeyError, TypeError, RecursionError):
        process.unread += 1
        return
    if form > FORMAT:
        problems.append(f"{file.name} is of a newer vgen ({process.vgen}): read as far as known")
    if first:
        process.first_part = part


def deleted(place: str | Path, processes: Iterable[Process]) -> list[str]:
    """A sentence for each process of a directory whose first files are not there any more."""
    return [
        f"the first {process.first_part} files of {process.label} were deleted, and what was in them"
        for process in processes
        if process.first_part and Path(place).is_dir()
    ]


def parse(line: str) -> dict[str, Any]:
    """The record on a line, of a known type whole, of an unknown one as it is; `ValueError` for anything else."""
    try:
        record = json.loads(line)
        kind = record["type"]
        if kind in ("start", "end"):
            end = record["end_unix_ns"] if kind == "end" else 0
            numbers = type(record["start_unix_ns"]) is type(end) is int
            texts = (record["name"], record["trace_id"], record["span_id"], record.get("parent_id") or "")
            good = numbers and set(map(type, texts)) == {str} and type(record["attributes"]) is dict
        elif kind == "measurement":
            good = type(record["values"]) is list and type(record["attributes"]) is dict
            good = good and type(record["name"]) is str
        elif kind == "step":
            good = type(record["number"]) is int and type(record["summary"]) is dict
        else:
            good = type(kind) is str
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("no record") from error
    if not good:
        raise ValueError("no record")
    return record


def as_span(record: dict[str, Any], process: Process | None = None) -> SpanRecord:
    """The span of a `start` or `end` record that `parse` gave."""
    events, links = record.get("events"), record.get("links")
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
        [event for event in events if isinstance(event, dict)] if isinstance(events, list) else [],
        [link for link in links if isinstance(link, dict)] if isinstance(links, list) else [],
        process,
    )


def children(spans: Iterable[SpanRecord]) -> dict[str | None, list[SpanRecord]]:
    """Spans by the id of their parent; under None those whose parent is not among them."""
    known = {span.span_id: span for span in spans}
    found: dict[str | None, list[SpanRecord]] = {}
    for span in sorted(known.values(), key=lambda span: span.start_ns):
        found.setdefault(span.parent_id if span.parent_id in known else None, []).append(span)
    return found


def thin(kept: dict[str, SpanRecord], most: int) -> int:
    """Leave the longest `most` spans, and of these first those that failed or never ended; returns how many went.

    What holds others is longer than they are, and so stays with them.
    """

    def weight(span: SpanRecord) -> tuple[bool, bool, int]:
        return span.end_ns is None, span.error is not None, (span.end_ns or 0) - span.start_ns

    gone = sorted(kept.values(), key=weight)[: max(len(kept) - most, 0)]
    for span in gone:
        del kept[span.span_id]
    return len(gone)
