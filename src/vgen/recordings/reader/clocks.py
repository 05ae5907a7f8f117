"""The clocks of several hosts, put on one clock.

The clocks of two hosts may be minutes apart, and no record says so directly. But a span lies within its parent, also
when another process recorded the parent, and several ranks do the same step at the same time. Where the recorded times
contradict that, `align` shifts the clock of a process by the smallest amount that removes the contradiction, and
returns a sentence that says by how much and why. Processes on one host share its clock, so they are not shifted
against each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from .processes import Process

Times: TypeAlias = "tuple[int, int]"
"""Start and end, in Unix nanoseconds by the clock of the process that recorded them."""
Bounds: TypeAlias = "tuple[int, int]"
"""The least and the greatest shift that is possible, in nanoseconds."""

NOTICEABLE_NS = 10_000_000
"""A smaller shift is made, but not reported."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One span that says something about the clock of its process."""

    process: Process
    times: Times
    step: int | None = None
    """The number of the step, if the span is one."""
    parent: tuple[Process, Times] | None = None
    """The process that recorded the span's parent, and the parent's times."""


@dataclass
class _Evidence:
    """What is known about the clock of one process."""

    process: Process
    steps: dict[int, Times] = field(default_factory=dict[int, Times])
    """Steps by number."""
    parents: list[tuple[Process, Times, Times]] = field(default_factory=list["tuple[Process, Times, Times]"])
    """Spans whose parent another process recorded: that process, the parent's times, the span's times."""


def align(processes: Sequence[Process], observations: Iterable[Observation]) -> list[str]:
    """Set `shift_ns` of every process. Returns a sentence for each shift that is noticeable.

    The first process of the lowest rank keeps its clock. `observations` are not read where all processes are on one
    host.
    """
    evidence = {process.key: _Evidence(process) for process in processes}
    if len({process.host for process in processes}) < 2:
        return []
    for observation in observations:
        process_evidence = evidence[observation.process.key]
        if observation.step is not None:
            process_evidence.steps[observation.step] = observation.times
        if observation.parent is not None and observation.parent[0] is not observation.process:
            process_evidence.parents.append((*observation.parent, observation.times))
    waiting = sorted(evidence.values(), key=lambda each: (each.process.rank is None, each.process.rank or 0))
    settled = [waiting.pop(0)]
    sentences: list[str] = []
    while waiting:
        # Next comes the process that has most in common with those whose clocks are settled.
        pairs = [(each, other) for each in waiting for other in settled]
        process_evidence, reference = max(pairs, key=lambda pair: _in_common(*pair))
        waiting.remove(process_evidence)
        sentences += _settle(process_evidence, reference)
        settled.append(process_evidence)
    return sentences


def _child_and_parent_times(child: _Evidence, parent: _Evidence) -> list[tuple[Times, Times]]:
    """Times of a span and of its parent, for the spans of `child` whose parents `parent` recorded."""
    return [(inner, outer) for process, outer, inner in child.parents if process is parent.process]


def _in_common(one: _Evidence, other: _Evidence) -> tuple[bool, int, int]:
    """How well `one` can be aligned to `other`: same host, parent links, shared steps."""
    pairs = len(_child_and_parent_times(one, other)) + len(_child_and_parent_times(other, one))
    return one.process.host == other.process.host, pairs, len(one.steps.keys() & other.steps.keys())


def _settle(process_evidence: _Evidence, reference: _Evidence) -> list[str]:
    """Set the shift of one process relative to `reference`; a sentence if noticeable."""
    process, reference_process = process_evidence.process, reference.process
    process.shift_ns = reference_process.shift_ns
    if process.host == reference_process.host:
        return []
    as_child = _child_and_parent_times(process_evidence, reference)
    as_parent = _child_and_parent_times(reference, process_evidence)
    bounds = [(outer[0] - inner[0], outer[1] - inner[1]) for inner, outer in as_child]
    # Where this process recorded the parents, the same bounds hold with the other sign.
    bounds += [(inner[1] - outer[1], inner[0] - outer[0]) for inner, outer in as_parent]
    if bounds:
        shift, precision = _shift_within(bounds)
        reason = f"{len(bounds)} span{'s' * (len(bounds) > 1)} with a parent in the other process"
    else:
        shift, precision, reason = _shift_by_steps(process_evidence, reference)
    process.shift_ns += shift
    if abs(shift) < NOTICEABLE_NS:
        return []
    return [
        f"the clock of {process.label} ({process.host}) is {abs(shift) / 1e9:.3f} s "
        f"{'behind' if shift > 0 else 'ahead of'} that of {reference_process.label} ({reference_process.host}): "
        f"aligned by {reason}, to within {precision / 1e9:.3f} s"
    ]


def _shift_within(bounds: Sequence[Bounds]) -> tuple[int, int]:
    """A shift that fits all bounds, and its precision.

    The shift is 0 if none is needed, else the middle of the possible range.
    """
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    if low <= 0 <= high:
        return 0, 0
    if low > high:  # Some spans outlive their parents. What remains certain is that they began later.
        return max(low, 0), abs(low - high)
    return (low + high) // 2, (high - low) // 2


def _shift_by_steps(process_evidence: _Evidence, reference: _Evidence) -> tuple[int, int, str]:
    """Shift, precision and reason, from the steps that both processes recorded."""
    rank = process_evidence.process.rank
    common = process_evidence.steps.keys() & reference.steps.keys()
    if not common or (rank is not None and rank == reference.process.rank):
        return 0, 0, ""  # The same rank twice is a run that was started again, not a wrong clock.
    pairs = [(process_evidence.steps[number], reference.steps[number]) for number in common]
    apart = sum(times[1] < reference_times[0] or reference_times[1] < times[0] for times, reference_times in pairs)
    if 2 * apart <= len(pairs):
        return 0, 0, ""
    shifts = [reference_times[0] - times[0] for times, reference_times in pairs]
    shift = int(statistics.median(shifts))
    spread = max(abs(other - shift) for other in shifts)
    return shift, spread, f"the starts of {len(common)} common step{'s' * (len(common) > 1)}"
