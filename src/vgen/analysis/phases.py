"""Where each step's time went: every moment of it counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..profiling import names
from .recording import NO_STEP, OPEN, Key, Recording
from .run import Process

REST = "rest"
"""What of a step lies in no span beneath it."""
IDLE = "idle"
"""What lies between two steps and in no span of an engine."""

KINDS = {
    names.GENERATE: "generate",
    names.ENGINE_GENERATE: "generate",
    names.WEIGHT_SYNC: "sync",
    names.SLEEP: "sleep",
    names.WAKE_UP: "wake",
    names.ENGINE_INIT: "init",
}
ENGINE = ("generate", "sync", "sleep", "wake", "init")
"""The engine's work. Of several at once the last in this order gets the moment: a sync within a generate is a sync."""

Stretch: TypeAlias = "tuple[int, int, str]"
"""Start, end and the name of what filled it."""


@dataclass
class StepTime:
    """One step of one process. Times are Unix nanoseconds of the run's clock."""

    number: int
    process: Process
    trace: int
    start: int
    end: int
    """Of one that never ended: the last that its process recorded."""
    open: bool = False
    error: str | None = None
    generations: int = 0
    """How many calls of `generate` it made."""
    stretches: list[Stretch] = field(default_factory=list[Stretch])
    phases: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds by phase: the engine's, the caller's own spans by name, the rest. They add up to the step."""
    after: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds until the same process's next step: the engine's phases in it, and `idle`."""

    @property
    def seconds(self) -> float:
        """How long the step took."""
        return (self.end - self.start) / 1e9

    @property
    def trainer(self) -> float:
        """All that was not the engine's."""
        return sum(seconds for name, seconds in self.phases.items() if name not in ENGINE)

    @property
    def key(self) -> Key:
        """What belongs to it in a recording."""
        return self.trace, self.number

    def calls(self) -> list[tuple[int, int]]:
        """When the engine generated."""
        return [(start, end) for start, end, name in self.stretches if name == "generate"]


def split(start: int, end: int, stretches: Iterable[Stretch], rest: str) -> dict[str, float]:
    """Seconds between `start` and `end` by what filled them. Each moment counts once: their sum is `end - start`."""
    changes: list[tuple[int, int, str]] = []
    for begin, until, name in stretches:
        begin, until = max(begin, start), min(until, end)
        if begin < until:
            changes += [(begin, 1, name), (until, -1, name)]
    changes.sort()
    found: dict[str, int] = {}
    running: dict[str, int] = {}
    now = start
    for time, change, name in [*changes, (end, 0, "")]:
        if time > now:
            what = max(running, key=_priority) if running else rest
            found[what] = found.get(what, 0) + time - now
            now = time
        if change:
            running[name] = running.get(name, 0) + change
            if not running[name]:
                del running[name]
    return {name: lasted / 1e9 for name, lasted in found.items()}


def _priority(name: str) -> int:
    return ENGINE.index(name) if name in ENGINE else -1


def step_times(recording: Recording) -> list[StepTime]:
    """The steps of all processes in the order of their starts, each with its phases."""
    steps = _steps(recording)
    by_trace: dict[int, list[StepTime]] = {}
    by_span: dict[int, StepTime] = {}
    for row, step in steps.items():
        by_trace.setdefault(step.trace, []).append(step)
        by_span[recording.span_id[row]] = step
    outside: dict[int, list[Stretch]] = {}
    kinds = [KINDS.get(name) for name in recording.names]
    columns = zip(recording.name, recording.parent_id, strict=True)
    for row, (name, parent) in enumerate(columns):
        kind = kinds[name]
        if kind is None and parent not in by_span:
            continue
        process = recording.processes[recording.process[row]]
        start, end = recording.start[row] + process.shift_ns, recording.end[row] + process.shift_ns
        if recording.end[row] == OPEN:
            end = process.last_ns + process.shift_ns
        step = by_span.get(parent) or _holder(by_trace.get(recording.trace[row], ()), recording.step[row], start)
        if step is not None:
            step.stretches.append((start, end, kind or recording.names[name]))
            step.generations += recording.names[name] == names.GENERATE
        elif kind is not None:
            outside.setdefault(recording.process[row], []).append((start, end, kind))
    ordered = sorted(steps.values(), key=lambda step: step.start)
    for step in ordered:
        step.phases = split(step.start, step.end, step.stretches, REST)
    _fill_gaps(recording, ordered, outside)
    return ordered


def _steps(recording: Recording) -> dict[int, StepTime]:
    if names.STEP not in recording.names:
        return {}
    found: dict[int, StepTime] = {}
    number = recording.names.index(names.STEP)
    for row, name in enumerate(recording.name):
        if name != number or recording.step[row] == NO_STEP:
            continue
        process = recording.processes[recording.process[row]]
        start, end = recording.start[row] + process.shift_ns, recording.end[row] + process.shift_ns
        unended = recording.end[row] == OPEN
        if unended:
            end = max(process.last_ns + process.shift_ns, start)
        error = recording.failed.get(row)
        found[row] = StepTime(recording.step[row], process, recording.trace[row], start, end, unended, error)
    return found


def _holder(candidates: Sequence[StepTime], number: int, start: int) -> StepTime | None:
    """The step that a span of its trace belongs to: by its number, or by when it began where it has none."""
    for step in candidates:
        if step.number == number or (number == NO_STEP and step.start <= start < step.end):
            return step
    return None


def _fill_gaps(recording: Recording, steps: Sequence[StepTime], outside: dict[int, list[Stretch]]) -> None:
    last: dict[str, StepTime] = {}
    numbers = {process.key: index for index, process in enumerate(recording.processes)}
    between: dict[str, list[Stretch]] = {key: sorted(outside.get(index, ())) for key, index in numbers.items()}
    for step in steps:
        key = step.process.key
        previous, last[key] = last.get(key), step
        if previous is None or step.start <= previous.end:
            continue
        waiting = between[key]
        while waiting and waiting[0][1] <= previous.end:
            waiting.pop(0)
        inside = [stretch for stretch in waiting if stretch[0] < step.start]
        previous.after = split(previous.end, step.start, inside, IDLE)
