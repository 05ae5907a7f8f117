"""Where the time of each step went. Every moment of it is counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ...profiling import semconv
from ..reader.processes import Process
from ..reader.recording import OPEN, Recording
from ..reader.requests import NO_STEP, Key

REST = "rest"
"""The phase of the moments of a step that no span beneath it covers."""
IDLE = "idle"
"""The phase of the moments between two steps that no span of an engine covers."""

KINDS = {
    semconv.GENERATE: "generate",
    semconv.ENGINE_GENERATE: "generate",
    semconv.WEIGHT_SYNC: "sync",
    semconv.SLEEP: "sleep",
    semconv.WAKE_UP: "wake",
    semconv.ENGINE_INIT: "init",
}
"""The engine's phase of each span name."""
ENGINE = ("generate", "sync", "sleep", "wake", "init")
"""The engine's phases. Of several at once, the last in this order counts: a sync within a generate is a sync."""

Stretch: TypeAlias = "tuple[int, int, str]"
"""Start, end, and the phase that it belongs to."""


@dataclass
class StepTimes:
    """One step of one process. Times are Unix nanoseconds on the clock of the run."""

    number: int
    process: Process
    trace: int
    start: int
    end: int
    """For a step that never ended: the last time that its process recorded."""
    open: bool = False
    error: str | None = None
    generate_calls: int = 0
    stretches: list[Stretch] = field(default_factory=list[Stretch])
    phases: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds by phase: the engine's, the caller's spans by name, and the rest. They add up to the step."""
    after: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds until the next step of the same process: the engine's phases, and `idle`."""

    @property
    def seconds(self) -> float:
        """How long the step took."""
        return (self.end - self.start) / 1e9

    @property
    def trainer_seconds(self) -> float:
        """All that was not the engine's."""
        return sum(seconds for name, seconds in self.phases.items() if name not in ENGINE)

    @property
    def key(self) -> Key:
        """What names the step in a recording."""
        return self.trace, self.number

    def generating(self) -> list[tuple[int, int]]:
        """When the engine generated."""
        return [(start, end) for start, end, name in self.stretches if name == "generate"]


def split(start: int, end: int, stretches: Iterable[Stretch], rest: str) -> dict[str, float]:
    """Seconds between `start` and `end` by phase. Each moment counts once, so their sum is `end - start`."""
    changes: list[tuple[int, int, str]] = []
    for begin, until, name in stretches:
        begin, until = max(begin, start), min(until, end)
        if begin < until:
            changes += [(begin, 1, name), (until, -1, name)]
    changes.sort()
    phases, running = Counter[str](), Counter[str]()
    now = start
    for time, change, name in [*changes, (end, 0, "")]:
        if time > now:
            phase = max(running, key=_priority) if running else rest
            phases[phase] += time - now
            now = time
        if change:
            running[name] += change
            if not running[name]:
                del running[name]
    return {name: nanoseconds / 1e9 for name, nanoseconds in phases.items()}


def add_up(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of several dicts, key by key."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def _priority(name: str) -> int:
    return ENGINE.index(name) if name in ENGINE else -1


def step_times(recording: Recording) -> list[StepTimes]:
    """The steps of all processes in the order of their starts, each with its phases."""
    steps = _steps(recording)
    by_trace: dict[int, list[StepTimes]] = {}
    by_span: dict[int, StepTimes] = {}
    for row, step in steps.items():
        by_trace.setdefault(step.trace, []).append(step)
        by_span[recording.span_id[row]] = step
    outside: dict[str, list[Stretch]] = {}
    kinds = [KINDS.get(name) for name in recording.names]
    for row, (name, parent) in enumerate(zip(recording.name, recording.parent_id, strict=True)):
        kind = kinds[name]
        if kind is None and parent not in by_span:
            continue
        start, end, process = _times(recording, row)
        step = by_span.get(parent) or _step_of(by_trace.get(recording.trace[row], ()), recording.step[row], start)
        if step is not None:
            step.stretches.append((start, end, kind or recording.names[name]))
            step.generate_calls += recording.names[name] == semconv.GENERATE
        elif kind is not None:
            outside.setdefault(process.key, []).append((start, end, kind))
    ordered = sorted(steps.values(), key=lambda step: step.start)
    for step in ordered:
        step.phases = split(step.start, step.end, step.stretches, REST)
    _fill_gaps(ordered, {key: sorted(stretches) for key, stretches in outside.items()})
    return ordered


def _times(recording: Recording, row: int) -> tuple[int, int, Process]:
    """Start and end on the clock of the run, and the process. A span that never ended lasts to the last record."""
    process = recording.processes[recording.process[row]]
    end = process.last_ns if recording.end[row] == OPEN else recording.end[row]
    return recording.start[row] + process.shift_ns, end + process.shift_ns, process


def _steps(recording: Recording) -> dict[int, StepTimes]:
    """The steps, by row."""
    if semconv.STEP not in recording.names:
        return {}
    steps: dict[int, StepTimes] = {}
    step_name = recording.names.index(semconv.STEP)
    for row, name in enumerate(recording.name):
        number = recording.step[row]
        if name == step_name and number != NO_STEP:
            start, end, process = _times(recording, row)
            unended = recording.end[row] == OPEN
            end, error = max(start, end) if unended else end, recording.failed.get(row)
            steps[row] = StepTimes(number, process, recording.trace[row], start, end, unended, error)
    return steps


def _step_of(steps: Sequence[StepTimes], number: int, start: int) -> StepTimes | None:
    """The step of a trace that a span belongs to: by the span's step number, or else by when the span started."""
    for step in steps:
        if step.number == number or (number == NO_STEP and step.start <= start < step.end):
            return step
    return None


def _fill_gaps(steps: Sequence[StepTimes], outside: dict[str, list[Stretch]]) -> None:
    """Set `after` of each step. `outside` are the engine's stretches that belong to no step, by process, in order."""
    last: dict[str, StepTimes] = {}
    for step in steps:
        key = step.process.key
        previous, last[key] = last.get(key), step
        if previous is None or step.start <= previous.end:
            continue
        stretches = outside.get(key, [])
        while stretches and stretches[0][1] <= previous.end:
            stretches.pop(0)
        between = [stretch for stretch in stretches if stretch[0] < step.start]
        previous.after = split(previous.end, step.start, between, IDLE)
