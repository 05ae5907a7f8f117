"""The requests of a run: when each of them ran, and the slowest ones."""

from __future__ import annotations

import heapq
import math
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ...profiling import semconv
from ...profiling.aggregation import Histogram
from .processes import Process

Key: TypeAlias = "tuple[int, int]"
"""Names one step: the number of its trace in the recording, and the step's number or `NO_STEP`."""

NO_STEP = -(1 << 63)
LAST = (1 << 63) - 1
"""The last moment that a column can hold."""
YEAR = 366 * 86400.0
"""No request takes longer, in seconds."""
SLOWEST = 5
"""How many of the slowest requests are kept, of each step and of the run."""

_Entry: TypeAlias = "tuple[int, int, Process, str]"
"""Nanoseconds, order of arrival, process, line."""


@dataclass
class RequestTimes:
    """When the requests of one step ran, in Unix nanoseconds of their process's clock."""

    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    """In the same order as `starts`."""
    servers: dict[str, tuple[int, Histogram]] = field(default_factory=dict[str, "tuple[int, Histogram]"])
    """By server: the end of its last request, and the seconds of all its requests."""


@dataclass
class SlowRequest:
    """A request that took long."""

    seconds: float
    process: Process
    attributes: dict[str, Any]


class Requests:
    """What a recording keeps of requests. Their spans are only counted, except the slowest.

    The start and the end of each request come from two measurements of a generate call, `vgen.request.start` (seconds
    from the start of the call's span) and `vgen.request.e2e` (seconds), both in the same order of requests.
    """

    def __init__(self) -> None:
        self.spans = 0
        """How many spans of requests the recording has."""
        self.times: dict[tuple[Key, int], RequestTimes] = {}
        """By step and number of the process."""
        self._of_run: list[_Entry] = []
        self._of_steps: defaultdict[Key, list[_Entry]] = defaultdict(list)
        self._call_starts: dict[int, int] = {}
        """Start of each generate call, by its span ID."""
        self._offsets: dict[tuple[str, str], list[float]] = {}
        """`vgen.request.start` by call and server, until `vgen.request.e2e` comes."""
        self._waiting: dict[int, list[tuple[Key, int, str, list[float], list[float]]]] = {}
        """Requests of calls whose span has not ended yet, by its ID."""

    def add_span(self, key: Key, took_ns: int, process: Process, line: str) -> None:
        """Count a request, and keep its line while it is among the slowest of its step or of the run."""
        self.spans += 1
        heap = self._of_steps[key]
        if len(heap) >= SLOWEST and took_ns <= heap[0][0]:
            return  # not among the slowest of its step, so not among the slowest of the run
        for slowest in (heap, self._of_run):
            if len(slowest) < SLOWEST:
                heapq.heappush(slowest, (took_ns, self.spans, process, line))
            elif took_ns > slowest[0][0]:
                heapq.heapreplace(slowest, (took_ns, self.spans, process, line))

    def add_call(self, span_id: int, start_ns: int) -> None:
        """The span of a generate call, which says when the offsets of its requests begin."""
        self._call_starts[span_id] = start_ns
        for waiting in self._waiting.pop(span_id, ()):
            self._add_times(*waiting, start_ns)

    def add_measurement(
        self, key: Key, process: int, name: str, attributes: dict[str, Any], values: list[float]
    ) -> None:
        """Values of `vgen.request.start` or `vgen.request.e2e`. `process` is the number of the process."""
        call, server = str(attributes.get(semconv.ENGINE_CALL)), str(attributes.get(semconv.SERVER, ""))
        if name == semconv.REQUEST_START.name:
            self._offsets[call, server] = values
            return
        offsets = self._offsets.pop((call, server), [])
        if offsets and len(offsets) == len(values):
            span_id = int(call, 16)
            if span_id in self._call_starts:
                self._add_times(key, process, server, offsets, values, self._call_starts[span_id])
            else:
                self._waiting.setdefault(span_id, []).append((key, process, server, offsets, values))

    def end_process(self) -> None:
        """The files of a process have ended: offsets without seconds stay incomplete."""
        self._offsets = {}

    def shift(self, process: int, by_trace: dict[int, int]) -> None:
        """Move the times of a process's requests, by the number of their trace, by so many nanoseconds."""
        for ((trace, _), number), times in self.times.items():
            if number == process and (by := by_trace.get(trace)):
                times.starts = array("q", [min(start + by, LAST) for start in times.starts])
                times.ends = array("q", [min(end + by, LAST) for end in times.ends])
                for server, (last, histogram) in times.servers.items():
                    times.servers[server] = last + by, histogram

    def slowest(self) -> list[SlowRequest]:
        """The slowest requests of the run, the slowest first."""
        return _parsed(self._of_run)

    def slowest_of(self, key: Key) -> list[SlowRequest]:
        """The slowest requests of a step, the slowest first."""
        return _parsed(self._of_steps.get(key, []))

    def _add_times(
        self, key: Key, process: int, server: str, offsets: list[float], seconds: list[float], call_start: int
    ) -> None:
        times = self.times.setdefault((key, process), RequestTimes())
        if not (math.isfinite(sum(offsets) + sum(seconds)) and _are_possible(offsets, seconds)):
            return
        starts = [call_start + int(offset * 1e9) for offset in offsets]
        ends = [start + int(took * 1e9) for start, took in zip(starts, seconds, strict=True)]
        times.starts.extend(starts)
        times.ends.extend(ends)
        if server and ends:
            last, histogram = times.servers.get(server, (0, Histogram()))
            histogram.extend(seconds)
            times.servers[server] = max(last, *ends), histogram


def _are_possible(offsets: list[float], seconds: list[float]) -> bool:
    return not seconds or (max(*offsets, *seconds) < YEAR and min(offsets) > -YEAR and min(seconds) >= 0)


def _parsed(entries: list[_Entry]) -> list[SlowRequest]:
    return [
        SlowRequest(took_ns / 1e9, process, (process.parse(line) or {}).get("attributes", {}))
        for took_ns, _, process, line in sorted(entries, key=lambda entry: (-entry[0], entry[1]))
    ]
