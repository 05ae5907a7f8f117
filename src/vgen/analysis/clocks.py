"""Clocks of several hosts, brought together by what must have been so.

Two hosts' clocks may be minutes apart, and nothing in a record says so directly. But a span lies within its
parent, also when that is another process's, and the same step of several ranks is one stretch of time. Where
the recorded times contradict that, a process's clock is shifted by the least certain-enough amount, and a
sentence says by how much and why. Processes of one host share its clock, and are left alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from .run import Process

Times: TypeAlias = "tuple[int, int]"
"""Start and end, in nanoseconds of the recording process's clock."""

NOTICEABLE_NS = 10_000_000
"""A shift below this is made and not talked about."""


@dataclass
class Witness:
    """What one process has to say about its clock."""

    process: Process
    steps: dict[int, Times] = field(default_factory=dict[int, Times])
    """Steps by number."""
    parents: list[tuple[Process, Times, Times]] = field(default_factory=list["tuple[Process, Times, Times]"])
    """Spans whose parent another process recorded: that process, the parent's times, the span's own."""


def align(witnesses: Sequence[Witness]) -> list[str]:
    """Set `shift_ns` of every process; returns what was done or could not be, a sentence each.

    The first process of the lowest rank keeps its clock.
    """
    waiting = sorted(witnesses, key=_rank)
    if not waiting:
        return []
    told: list[str] = []
    settled = [waiting.pop(0)]
    while waiting:
        # whoever has most to do with those that are settled comes next
        witness = max(waiting, key=lambda one: max(_ties(one, other) for other in settled))
        waiting.remove(witness)
        reference = max(settled, key=lambda other: _ties(witness, other))
        sentence = _settle(witness, reference)
        if sentence is not None:
            told.append(sentence)
        settled.append(witness)
    return told


def _rank(witness: Witness) -> tuple[bool, int]:
    return witness.process.rank is None, witness.process.rank or 0


def _pairs(witness: Witness, other: Witness) -> list[tuple[Times, Times]]:
    """Outer and inner times, outer ones of `other`'s clock, inner ones of the witness's."""
    return [(outer, inner) for owner, outer, inner in witness.parents if owner is other.process]


def _ties(witness: Witness, other: Witness) -> tuple[bool, int, int]:
    pairs = len(_pairs(witness, other)) + len(_pairs(other, witness))
    return witness.process.host == other.process.host, pairs, len(witness.steps.keys() & other.steps.keys())


def _settle(witness: Witness, reference: Witness) -> str | None:
    process, known = witness.process, reference.process
    process.shift_ns = known.shift_ns
    if process.host == known.host:
        return None
    below = [(outer[0] - inner[0], outer[1] - inner[1]) for outer, inner in _pairs(witness, reference)]
    # where the witness has the parents, the same bounds hold the other way round
    below += [(inner[1] - outer[1], inner[0] - outer[0]) for outer, inner in _pairs(reference, witness)]
    if below:
        shift, precision = _between(below)
        reason = f"{len(below)} span{'s' * (len(below) > 1)} with a parent in the other process"
    else:
        shift, precision, reason = _by_steps(witness, reference)
    process.shift_ns += shift
    if abs(shift) < NOTICEABLE_NS:
        return None
    way = "behind" if shift > 0 else "ahead of"
    return (
        f"the clock of {process.label} ({process.host}) is {abs(shift) / 1e9:.3f} s {way} that of {known.label} "
        f"({known.host}): aligned by {reason}, to within {precision / 1e9:.3f} s"
    )


def _between(bounds: Sequence[Times]) -> tuple[int, int]:
    """The shift that fits all bounds, none where none is needed, the middle otherwise; and how sure that is."""
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    if low <= 0 <= high:
        return 0, 0
    if low > high:  # spans that outlive their parents: only that they began later is certain
        return max(low, 0), abs(low - high)
    return (low + high) // 2, (high - low) // 2


def _by_steps(witness: Witness, reference: Witness) -> tuple[int, int, str]:
    mine, theirs = witness.process, reference.process
    common = witness.steps.keys() & reference.steps.keys()
    if not common or (mine.rank is not None and mine.rank == theirs.rank):
        return 0, 0, ""  # the same rank twice is a run that was started again, not a clock that is wrong
    pairs: Mapping[int, tuple[Times, Times]] = {n: (witness.steps[n], reference.steps[n]) for n in common}
    apart = sum(own[1] < other[0] or other[1] < own[0] for own, other in pairs.values())
    if 2 * apart <= len(pairs):
        return 0, 0, ""
    shifts = [other[0] - own[0] for own, other in pairs.values()]
    shift = int(statistics.median(shifts))
    spread = max(abs(one - shift) for one in shifts)
    return shift, spread, f"the starts of {len(common)} common step{'s' * (len(common) > 1)}"
