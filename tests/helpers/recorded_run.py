"""A small run, read into memory as a whole: spans, measurements and summary rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen.profiling import recording_format, semconv
from vgen.recordings.reader.processes import lines
from vgen.recordings.reader.run import SpanRecord, as_span, grouped


@dataclass(slots=True)
class Run:
    """The spans, measurements and summary rows of all processes that wrote into one directory."""

    spans: list[SpanRecord]
    """In the order of their starts."""
    measurements: list[dict[str, Any]]
    """With the keys that `recording_format` lists."""
    rows: list[tuple[int, dict[str, float]]]
    """Step number and summary, in the order in which the steps ended."""
    problems: list[str]
    """What could not be read, one sentence each."""

    def traces(self) -> list[list[SpanRecord]]:
        """The spans of each trace, in the order of the traces' first spans."""
        return grouped(self.spans, lambda span: span.trace_id)

    def step(self, number: int) -> list[SpanRecord]:
        """The trace of the step with this number; empty if there is none."""
        for trace in self.traces():
            if any(span.attributes.get(semconv.STEP_NUMBER) == number for span in trace):
                return trace
        return []


def read_run(place: str | Path) -> Run:
    """Read every `*.jsonl` file below a directory, or one file. What cannot be read is in `problems`."""
    run = Run([], [], [], [])
    started: dict[str, SpanRecord] = {}
    ended: dict[str, SpanRecord] = {}
    for process, line in lines(place, run.problems):
        try:
            record = recording_format.parse(line)
        except ValueError:
            process.damaged += 1
            continue
        kind = record["type"]
        if kind in ("start", "end"):
            (ended if kind == "end" else started)[record["span_id"]] = as_span(record, process)
        elif kind == "measurement":
            run.measurements.append(record)
        elif kind == "step":
            run.rows.append((record["number"], record["summary"]))
    run.spans = sorted((started | ended).values(), key=lambda span: span.start_ns)
    return run
