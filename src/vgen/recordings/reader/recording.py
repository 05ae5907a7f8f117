"""A run of any size in little memory: its spans as columns, its measurements as far as a report needs them."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...profiling import recording_format, semconv
from .processes import Process, lines
from .requests import LAST, NO_STEP, Key, Requests
from .set_back import corrections

OPEN = -(1 << 63)
"""The end of a span that never ended."""
SYNC_PHASE = f"{semconv.WEIGHT_SYNC}."
"""The beginning of the names of the phases of a sync."""
DISTRIBUTIONS = {
    semconv.REQUEST_E2E.name: "e2e",
    semconv.REQUEST_QUEUE.name: "queue",
    semconv.REQUEST_TTFT.name: "time_to_first_token",
    semconv.REQUEST_TPOT.name: "time_per_output_token",
    semconv.COMPLETION_LENGTH.name: "output_tokens",
}
"""The histograms whose percentiles a report shows, with their names in the report."""
COUNTERS = frozenset({semconv.PROMPT_TOKENS.name, semconv.GENERATED_TOKENS.name})
"""The counters that a report sums up by step."""
MOST_ERRORS = 1000
"""How many spans keep the type of their exception by row. `errors` counts all of them."""
LARGEST = 1e18
"""A larger measurement is impossible, and left out: sums of many of these are far from the limits of a float."""
_GENERATE_CALLS = (semconv.ENGINE_GENERATE, semconv.GENERATE)
_WITH_ATTRIBUTES = {semconv.WEIGHT_SYNC, semconv.SLEEP, semconv.WAKE_UP, semconv.ENGINE_INIT}
_REQUEST_TIMES = (semconv.REQUEST_START.name, semconv.REQUEST_E2E.name)


class Recording:
    """A run's spans in the order in which they ended. Each is one row of the columns `name`, `span_id`, `start`, …

    Takes about 60 bytes for each span, whatever its attributes. Spans of requests have no rows: see `requests`.

        recording = Recording("runs/a")
        [recording.names[number] for number in recording.name]   # the names of all spans but requests
    """

    def __init__(self, place: str | Path) -> None:
        self.problems: list[str] = []
        """What could not be read, one sentence each."""
        self.processes: list[Process] = []
        self.names: list[str] = []
        self.name, self.process, self.trace = array("I"), array("I"), array("I")
        """By row: positions in `names` and `processes`, and a value of `traces`."""
        self.span_id, self.parent_id = array("Q"), array("Q")
        """By row: IDs as numbers; 0 for no parent."""
        self.start, self.end, self.step = array("q"), array("q"), array("q")
        """By row: Unix nanoseconds (`OPEN` for a span that never ended), and the step's number or `NO_STEP`."""
        self.attributes: dict[int, dict[str, Any]] = {}
        """By row, of syncs and their phases, sleeps, wake-ups, starts of engines and spans that never ended."""
        self.traces: dict[str, int] = {}
        """A number for each trace ID."""
        self.errors: Counter[tuple[str, str]] = Counter()
        """By span name and type of the exception."""
        self.failed: dict[int, str] = {}
        """Type of the exception by row, for the first `MOST_ERRORS`."""
        self.counters: dict[Key, Counter[str]] = {}
        """Sums of the `COUNTERS`, by step."""
        self.values: dict[Key, dict[str, array[float]]] = {}
        """Values of the `DISTRIBUTIONS`, by step."""
        self.requests = Requests()
        self.lost = 0
        """How many telemetry records the run itself reports as lost."""
        self._name_numbers: dict[str, int] = {}
        self._set_back: list[tuple[Process, int]] = []
        """Processes whose clock was set back, and by how many nanoseconds at least."""
        self._started: dict[int, dict[str, Any]] = {}
        """Records of spans that have started and not ended, by span ID."""
        self._read(place)

    def __len__(self) -> int:
        return len(self.start) + self.requests.spans

    def key(self, row: int) -> Key:
        """The step that the span belongs to."""
        return self.trace[row], self.step[row]

    def span_name(self, row: int) -> str:
        """The name of the span."""
        return self.names[self.name[row]]

    def seconds(self, row: int) -> float | None:
        """How long the span took; None for one that never ended."""
        return None if self.end[row] == OPEN else (self.end[row] - self.start[row]) / 1e9

    def step_number(self, row: int) -> int | None:
        """The number of the step that the span belongs to; None for none."""
        return None if self.step[row] == NO_STEP else self.step[row]

    def _read(self, place: str | Path) -> None:
        span_head, request, add_request = recording_format.span_head, semconv.REQUEST, self.requests.add_span
        traces, first_row, current = self.traces, 0, None
        for process, line in lines(place, self.problems):
            if process is not current:
                self._end_process(first_row)
                first_row, current = len(self.start), process
                self.processes.append(process)
            # Most lines are spans of which only the first keys are needed. The others are parsed as a whole.
            head = span_head(line)
            if head is not None and '"error":' not in line:
                name, trace, span, parent, start, end, step = head
                if end is None:
                    pass
                elif name == request:
                    key = traces.setdefault(trace, len(traces)), NO_STEP if step is None else step
                    add_request(key, end - start, process, line)
                    continue
                elif name not in _WITH_ATTRIBUTES and not name.startswith(SYNC_PHASE):
                    self._append(name, trace, span, parent, start, end, step)
                    if process.rank is None:
                        process.rank = recording_format.rank_in(line)
                    continue
            record = process.parse(line)
            if record is None:
                continue
            try:
                self._add(process, line, record)
            except (ValueError, OverflowError):
                process.damaged += 1
        self._end_process(first_row)
        ranks = Counter(process.rank for process in self.processes)
        for process in self.processes:
            process.shares_rank = ranks[process.rank] > 1
        self.problems += [
            f"the clock of {process.label} was set back by {by / 1e9:,.3f} s or more: times after that are shifted"
            for process, by in self._set_back
        ]

    def _add(self, process: Process, line: str, record: dict[str, Any]) -> None:
        """A record that was parsed. Raises ValueError or OverflowError for one with impossible values."""
        kind = record["type"]
        if kind == "end":
            self._add_span(process, line, record)
        elif kind == "start":
            self._started[int(record["span_id"], 16)] = record
            process.last_ns = max(process.last_ns, record["start_unix_ns"])
        elif kind == "measurement":
            self._add_measurement(process, record)
        if isinstance(attributes := record.get("attributes"), dict):
            process.take_rank(attributes)

    def _add_span(self, process: Process, line: str, record: dict[str, Any]) -> None:
        name, attributes, error = record["name"], record["attributes"], record.get("error")
        start, end, step = record["start_unix_ns"], record["end_unix_ns"], _step(attributes)
        if error is not None:
            self.errors[name, str(error)] += 1
        if name == semconv.REQUEST:
            self.requests.add_span(self._key(record["trace_id"], step), end - start, process, line)
            return
        row = self._append(*_ids(record), start, end, step)
        if name in _WITH_ATTRIBUTES or name.startswith(SYNC_PHASE):
            self.attributes[row] = attributes
        if error is not None and len(self.failed) < MOST_ERRORS:
            self.failed[row] = str(error)

    def _key(self, trace: str, step: int | None) -> Key:
        return self.traces.setdefault(trace, len(self.traces)), NO_STEP if step is None else step

    def _append(
        self, name: str, trace: str, span: str, parent: str | None, start: int, end: int, step: int | None
    ) -> int:
        number = self._name_numbers.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        span_id, parent_id = int(span, 16), int(parent, 16) if parent else 0
        trace_number, step_number = self._key(trace, step)
        # A value that one column refuses would leave the columns with different lengths.
        if not (
            max(abs(start), abs(end)) < 1 << 63 and abs(step or 0) < 1 << 63 and 0 <= span_id | parent_id < 1 << 64
        ):
            raise ValueError("out of range")
        row = len(self.start)
        self.name.append(number)
        self.span_id.append(span_id)
        self.parent_id.append(parent_id)
        self.start.append(start)
        self.end.append(end)
        self.step.append(step_number)
        self.trace.append(trace_number)
        self.process.append(len(self.processes) - 1)
        if name in _GENERATE_CALLS:
            self.requests.add_call(span_id, start)
        if self._started:
            self._started.pop(span_id, None)
        return row

    def _add_measurement(self, process: Process, record: dict[str, Any]) -> None:
        name, attributes, trace = record["name"], record["attributes"], record.get("trace_id")
        if type(record.get("unix_ns")) is int:
            process.last_ns = max(process.last_ns, record["unix_ns"])
        values = _floats(record["values"])
        possible = values if _are_possible(values) else [value for value in values if abs(value) < LARGEST]
        step = _step(attributes)
        # Outside of any span there is no trace: such values belong to no step, and a number of their own says so.
        number = self.traces.setdefault(trace, len(self.traces)) if isinstance(trace, str) else len(self.traces) + 1
        key = number, step if step is not None and abs(step) < 1 << 62 else NO_STEP
        if name in COUNTERS:
            self.counters.setdefault(key, Counter())[name] += int(sum(possible))
        elif name == semconv.DROPPED.name:
            self.lost += int(sum(possible))
        if name in DISTRIBUTIONS:
            known = self.values.setdefault(key, {}).setdefault(name, array("d"))
            known.extend(possible)
        if name in _REQUEST_TIMES:
            self.requests.add_measurement(key, len(self.processes) - 1, name, attributes, values)

    def _end_process(self, first_row: int) -> None:
        """The files of the last process, whose rows begin at `first_row`, have ended: open spans never ended."""
        if not self.processes:
            return
        process = self.processes[-1]
        if len(self.start) > first_row:
            process.last_ns = max(process.last_ns, max(self.end[first_row:]))
        self.requests.end_process()
        started, self._started = self._started, {}
        for record in started.values():
            row = self._append(*_ids(record), record["start_unix_ns"], 0, _step(record["attributes"]))
            self.end[row] = OPEN
            self.attributes[row] = record["attributes"]
        self._undo_set_back(process, first_row)

    def _undo_set_back(self, process: Process, first_row: int) -> None:
        """Where the clock of the last process was set back, move the times after that."""
        step_name, names = self._name_numbers.get(semconv.STEP), self.name
        rows = [row for row in range(first_row, len(names)) if names[row] == step_name]
        steps = [(self.trace[row], self.start[row], max(self.start[row], self.end[row])) for row in rows]
        by_trace = corrections(steps)
        if not by_trace:
            return
        for row in range(first_row, len(names)):
            by = by_trace.get(self.trace[row], 0)
            self.start[row] = min(self.start[row] + by, LAST)
            if self.end[row] != OPEN:
                self.end[row] = min(self.end[row] + by, LAST)
        process.last_ns = max(process.last_ns, max(self.start[first_row:]), max(self.end[first_row:]))
        self.requests.shift(len(self.processes) - 1, by_trace)
        self._set_back.append((process, max(by_trace.values())))


def _ids(record: dict[str, Any]) -> tuple[str, str, str, str | None]:
    """Name, trace ID, span ID and parent ID."""
    return record["name"], record["trace_id"], record["span_id"], record.get("parent_id")


def _step(attributes: dict[str, Any]) -> int | None:
    step = attributes.get(semconv.STEP_NUMBER)
    return step if type(step) is int else None


def _are_possible(values: list[float]) -> bool:
    # A sum is NaN if one of its values is; `min` and `max` do not see it.
    return not values or (math.isfinite(sum(values)) and min(values) > -LARGEST and max(values) < LARGEST)


def _floats(values: Iterable[Any]) -> list[float]:
    try:
        return list(map(float, values))
    except TypeError as error:
        raise ValueError("not a number") from error
