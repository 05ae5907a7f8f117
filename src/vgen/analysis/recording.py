"""A run of any size in little memory: its spans as columns, its measurements as they are needed."""

from __future__ import annotations

import heapq
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..profiling import names
from ..profiling.sketch import Histogram
from .run import Process, lines, parse

Key: TypeAlias = "tuple[int, int]"
"""What belongs to one step: the number of its trace in the recording, and the step's number or `NO_STEP`."""

NO_STEP = -(1 << 63)
OPEN = -(1 << 63)

PHASES = f"{names.WEIGHT_SYNC}."
"""What the names of the phases of a sync begin with."""
SLOWEST = SLOWEST_OF_STEP = 5
SHOWN = {
    names.REQUEST_E2E.name: "e2e",
    names.REQUEST_QUEUE.name: "queue",
    names.REQUEST_TTFT.name: "time_to_first_token",
    names.REQUEST_TPOT.name: "time_per_output_token",
    names.COMPLETION_LENGTH.name: "output_tokens",
}
"""Histograms whose percentiles a report quotes, and as what."""
COUNTED = frozenset({names.PROMPT_TOKENS.name, names.GENERATED_TOKENS.name})

# The writer's own form of a span, up to its first attribute. It is a fifth of the work of parsing all of it, and of
# most spans nothing else is needed; a line of any other form is parsed.
_SPAN = re.compile(
    r'\{"type":"end","name":"([^"\\]*)","trace_id":"([0-9a-f]{32})","span_id":"([0-9a-f]{16})",'
    r'"parent_id":(?:null|"([0-9a-f]{16})"),"start_unix_ns":([1-8]\d{18}),"end_unix_ns":([1-8]\d{18}),'
    r'"attributes":\{(?:"vgen\.step":(-?\d{1,18})[,}])?'
).match
_LATER = re.compile(r'[{,]"vgen\.step":(-?\d{1,18})[,}]').search
_WHOLE = {names.WEIGHT_SYNC, names.SLEEP, names.WAKE_UP, names.ENGINE_INIT}
"""Spans whose attributes are kept."""


@dataclass
class Timings:
    """When the requests of one step ran: Unix nanoseconds of their process's clock, starts and ends in one order."""

    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    servers: dict[str, tuple[int, int, Histogram]] = field(default_factory=dict[str, "tuple[int, int, Histogram]"])
    """By server: requests, the last one's end, seconds of them."""


@dataclass
class Slow:
    """A request that took long."""

    seconds: float
    process: Process
    attributes: dict[str, Any]


class Recording:
    """Spans in the order in which they ended, one row each in `name`, `span_id`, `start` and the other columns.

    A span that never ended has the end `OPEN`. About 60 bytes a span, whatever its attributes.
    """

    def __init__(self, place: str | Path) -> None:
        self.problems: list[str] = []
        self.processes: list[Process] = []
        self.names: list[str] = []
        self.name, self.process, self.trace = array("I"), array("I"), array("I")
        self.span_id, self.parent_id = array("Q"), array("Q")
        self.start, self.end, self.step = array("q"), array("q"), array("q")
        self.attributes: dict[int, dict[str, Any]] = {}
        """By row, for syncs and their phases, sleeps, wake-ups and starts of engines."""
        self.traces: dict[str, int] = {}
        self.errors: Counter[tuple[str, str]] = Counter()
        """By span name and type of the exception."""
        self.failed: dict[int, str] = {}
        """Type of the exception by row, for the first thousand."""
        self.timings: dict[tuple[Key, int], Timings] = {}
        """By step and number of the process."""
        self.counted: dict[Key, Counter[str]] = {}
        """Sums of the counters in `COUNTED`, by step."""
        self.values: dict[Key, dict[str, array[float]]] = {}
        """Of the histograms in `SHOWN`, by step."""
        self.slowest: list[Slow] = []
        self.slowest_of_step: dict[Key, list[Slow]] = {}
        self.requests = 0
        """Spans of requests. They have no rows: only the slowest of them are kept."""
        self.lost = 0
        """Telemetry records that the run itself says were lost."""
        self._numbers: dict[str, int] = {}
        self._started: dict[int, dict[str, Any]] = {}
        self._calls: dict[int, int] = {}
        self._untimed: dict[int, list[tuple[Key, str, list[float], list[float]]]] = {}
        """Requests of calls whose span is still to come."""
        self._starts: dict[tuple[str, str], list[float]] = {}
        self._heap: list[tuple[int, int, Process, str]] = []
        self._heaps: dict[tuple[str, str | int | None], list[tuple[int, int, Process, str]]] = {}
        self._read(place)
        self._choose()

    def __len__(self) -> int:
        return len(self.start) + self.requests

    def key(self, row: int) -> Key:
        """What the span belongs to."""
        return self.trace[row], self.step[row]

    def _read(self, place: str | Path) -> None:
        request, whole = names.REQUEST, _WHOLE
        first = 0
        for process, line in lines(place, self.problems):
            if not self.processes or self.processes[-1] is not process:
                self._end_process(first)
                first = len(self.start)
                self.processes.append(process)
            found = _SPAN(line)
            if found is not None and line.endswith("}\n") and '"error":' not in line:
                name, trace, span, parent, start, end, step = found.groups()
                if step is None and names.STEP_NUMBER in line and (later := _LATER(line)) is not None:
                    step = later[1]
                if name == request:
                    self._request(trace, step, int(end) - int(start), process, line)
                    continue
                if name not in whole and not name.startswith(PHASES):
                    self._append(name, trace, span, parent, int(start), int(end), step)
                    if process.rank is None:
                        process.rank = _rank(line)
                    continue
            self._take(process, line)
        self._end_process(first)
        ranks = Counter(one.rank for one in self.processes)
        for one in self.processes:
            one.twin = ranks[one.rank] > 1

    def _take(self, process: Process, line: str) -> None:
        """A line of any kind, parsed as a whole."""
        try:
            record = parse(line)
            kind = record["type"]
            if kind == "end":
                own = record["attributes"]
                step = own.get(names.STEP_NUMBER)
                step = step if type(step) is int else None
                error = record.get("error")
                if error is not None:
                    self.errors[record["name"], str(error)] += 1
                if record["name"] == names.REQUEST:
                    took = record["end_unix_ns"] - record["start_unix_ns"]
                    self._request(record["trace_id"], step, took, process, line)
                else:
                    row = self._append(
                        *(record["name"], record["trace_id"], record["span_id"], record.get("parent_id")),
                        *(record["start_unix_ns"], record["end_unix_ns"], step),
                    )
                    if record["name"] in _WHOLE or record["name"].startswith(PHASES):
                        self.attributes[row] = own
                    if error is not None and len(self.failed) < 1000:
                        self.failed[row] = str(error)
            elif kind == "start":
                self._started[int(record["span_id"], 16)] = record
                process.last_ns = max(process.last_ns, record["start_unix_ns"])
            elif kind == "measurement":
                self._measurement(process, record)
        except (ValueError, OverflowError):
            process.unread += 1
            return
        rank = record["attributes"].get(names.RANK) if "attributes" in record else None
        if process.rank is None and type(rank) is int:
            process.rank = rank

    def _append(
        self, name: str, trace: str, span: str, parent: str | None, start: int, end: int, step: str | int | None
    ) -> int:
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self.names)
            self.names.append(name)
        identity, above, of = int(span, 16), int(parent, 16) if parent else 0, NO_STEP if step is None else int(step)
        if not (max(abs(start), abs(end)) < 1 << 63 and NO_STEP <= of < 1 << 63 and 0 <= identity | above < 1 << 64):
            raise ValueError("out of range")
        row = len(self.start)
        self.name.append(number)
        self.span_id.append(identity)
        self.parent_id.append(above)
        self.start.append(start)
        self.end.append(end)
        self.step.append(of)
        self.trace.append(self.traces.setdefault(trace, len(self.traces)))
        self.process.append(len(self.processes) - 1)
        if name in (names.ENGINE_GENERATE, names.GENERATE):
            self._calls[identity] = start
            for waiting in self._untimed.pop(identity, ()):
                self._timed(*waiting, start)
        if self._started:
            self._started.pop(identity, None)
        return row

    def _measurement(self, process: Process, record: dict[str, Any]) -> None:
        name, own, step = record["name"], record["attributes"], record["attributes"].get(names.STEP_NUMBER)
        if type(record.get("unix_ns")) is int:
            process.last_ns = max(process.last_ns, record["unix_ns"])
        values = _floats(record["values"])
        trace = record.get("trace_id")
        trace = self.traces.setdefault(trace, len(self.traces)) if isinstance(trace, str) else len(self.traces) + 1
        key = trace, step if type(step) is int and abs(step) < 1 << 62 else NO_STEP
        if name in COUNTED:
            self.counted.setdefault(key, Counter())[name] += int(sum(values))
        elif name == names.DROPPED.name:
            self.lost += int(sum(values))
        elif name == names.REQUEST_START.name:
            self._starts[str(own.get(names.ENGINE_CALL)), str(own.get(names.SERVER, ""))] = values
        if name in SHOWN:
            own_values = self.values.setdefault(key, {}).setdefault(name, array("d"))
            own_values.extend(value for value in values if math.isfinite(value))
        if name == names.REQUEST_E2E.name:
            call, server = str(own.get(names.ENGINE_CALL)), str(own.get(names.SERVER, ""))
            starts = self._starts.pop((call, server), [])
            if starts and len(starts) == len(values):
                identity = int(call, 16)
                if identity in self._calls:
                    self._timed(key, server, starts, values, self._calls[identity])
                else:
                    self._untimed.setdefault(identity, []).append((key, server, starts, values))

    def _timed(self, key: Key, server: str, starts: list[float], seconds: list[float], base: int) -> None:
        """Requests by when they were queued after their call began, and how long they took."""
        timings = self.timings.setdefault((key, len(self.processes) - 1), Timings())
        if not math.isfinite(sum(starts) + sum(seconds)):
            return
        began = [base + int(offset * 1e9) for offset in starts]
        ended = [start + int(took * 1e9) for start, took in zip(began, seconds, strict=True)]
        timings.starts.extend(began)
        timings.ends.extend(ended)
        if server and ended:
            number, last, histogram = timings.servers.get(server, (0, 0, Histogram()))
            histogram.extend(seconds)
            timings.servers[server] = number + len(ended), max(last, *ended), histogram

    def _request(self, trace: str, step: str | int | None, took: int, process: Process, line: str) -> None:
        """Count a request, and keep its line as long as it is among the slowest of its step, or of the run."""
        self.requests += 1
        key = trace, step
        heap = self._heaps.get(key)
        if heap is None:
            heap = self._heaps[key] = []
        if len(heap) >= SLOWEST_OF_STEP and took <= heap[0][0]:
            return  # nor is it then among the run's
        for among, size in ((heap, SLOWEST_OF_STEP), (self._heap, SLOWEST)):
            if len(among) < size:
                heapq.heappush(among, (took, self.requests, process, line))
            elif took > among[0][0]:
                heapq.heapreplace(among, (took, self.requests, process, line))

    def _end_process(self, first: int) -> None:
        """What is still open when the last process's files have ended never ended. Its rows begin at `first`."""
        if not self.processes:
            return
        process = self.processes[-1]
        if len(self.start) > first:
            process.last_ns = max(process.last_ns, max(self.end[first:]))
        started, self._started, self._starts = self._started, {}, {}
        for record in started.values():
            step = record["attributes"].get(names.STEP_NUMBER)
            row = self._append(
                *(record["name"], record["trace_id"], record["span_id"], record.get("parent_id")),
                *(record["start_unix_ns"], 0, step if type(step) is int else None),
            )
            self.end[row] = OPEN
            self.attributes[row] = record["attributes"]

    def _choose(self) -> None:
        """The slowest requests, from the lines that are left."""
        for (trace, step), heap in self._heaps.items():
            key = self.traces.setdefault(trace, len(self.traces)), NO_STEP if step is None else int(step)
            self.slowest_of_step[key] = [_slow(*entry) for entry in sorted(heap, key=_longest_first)]
        self.slowest = [_slow(*entry) for entry in sorted(self._heap, key=_longest_first)]
        self._heaps, self._heap = {}, []


def _longest_first(entry: tuple[int, int, Process, str]) -> tuple[int, int]:
    return -entry[0], entry[1]


def _slow(took: int, order: int, process: Process, line: str) -> Slow:
    try:
        attributes = parse(line)["attributes"]
    except ValueError:
        attributes = {}
    return Slow(took / 1e9, process, attributes)


def _rank(line: str) -> int | None:
    found = re.search(r'"vgen\.rank":(\d{1,9})[,}]', line)
    return int(found[1]) if found is not None else None


def _floats(values: Iterable[Any]) -> list[float]:
    try:
        return [float(value) for value in values]
    except TypeError as error:
        raise ValueError("no number") from error
