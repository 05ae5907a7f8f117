"""How many requests ran at once, and what the last ones cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

LONG = 0.1
"""From how much more of the time than of the sequences on it is called a tail."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What the last sequences of a generation cost. Where several calls followed each other, all of them together."""

    sequences: int
    last: int
    """How many sequences make up the tail: those for which the time is longest for their number."""
    seconds: float
    """Of the tail: from the moment when only `last` sequences ran on."""
    generation_seconds: float
    running: float
    """How many sequences ran in the tail, on average."""
    peak: int
    """How many ran at most."""
    mean: float
    """How many ran on average, over the whole generation."""

    @property
    def share(self) -> float:
        """The tail's part of the generation's time."""
        return self.seconds / self.generation_seconds if self.generation_seconds else 0.0

    @property
    def long(self) -> bool:
        """Whether it is worth talking of."""
        return self.share - self.last / self.sequences >= LONG

    def sentence(self) -> str:
        """Such as `the last 3 % of sequences took 41 % of generation`."""
        took = f"took {100 * self.share:.0f} % of generation ({self.seconds:.2f} of {self.generation_seconds:.2f} s)"
        percent = f"{max(100 * self.last / self.sequences, 1):.0f} %"
        if not self.long:
            return f"no long tail: the last {percent} of sequences {took}"
        which = percent if self.sequences >= 100 else f"{self.last} of {self.sequences}"
        return f"the last {which} of sequences {took}, {self.running:.1f} running on average where {self.peak} had run"


class Curve:
    """How many of some requests ran, as a function of time. Times are integers of any one unit."""

    def __init__(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        self.starts, self.ends = sorted(starts), sorted(ends)
        self._started = [0, *accumulate(self.starts)]
        self._ended = [0, *accumulate(self.ends)]

    def area(self, time: int) -> int:
        """The time that all requests together had run until then."""
        started, ended = bisect_left(self.starts, time), bisect_left(self.ends, time)
        return started * time - self._started[started] - (ended * time - self._ended[ended])

    def mean(self, begin: int, end: int) -> float:
        """How many ran between two times, on average."""
        return (self.area(end) - self.area(begin)) / (end - begin) if end > begin else 0.0

    def bins(self, begin: int, end: int, number: int) -> list[float]:
        """The mean of each of `number` equal stretches."""
        edges = [begin + (end - begin) * index // number for index in range(number + 1)]
        areas = [self.area(edge) for edge in edges]
        return [
            (right - left) / (after - before) if after > before else 0.0
            for left, right, before, after in zip(areas, areas[1:], edges, edges[1:], strict=False)
        ]

    def peak(self) -> int:
        """How many ran at most."""
        ended = running = most = 0
        for running, start in enumerate(self.starts, 1):
            while ended < len(self.ends) and self.ends[ended] <= start:
                ended += 1
            most = max(most, running - ended)
        return most


def tail(starts: Sequence[int], ends: Sequence[int], calls: Sequence[tuple[int, int]]) -> Tail | None:
    """The tail of requests that ran in `calls`, in nanoseconds; None where none were timed.

    Calls that overlap are one generation; those one after the other each have a tail, and these are added up.
    """
    parts = [part for part in _parts(starts, ends, calls) if part[1].ends]
    if not parts:
        return None
    generation = sum(end - begin for (begin, end), _ in parts)
    tails = {percent: [_after(part, percent) for part in parts] for percent in range(1, 51)}

    def excess(percent: int) -> float:
        return sum(one[0] for one in tails[percent]) / generation - sum(one[1] for one in tails[percent]) / len(ends)

    most = max(tails, key=excess)
    taken = tails[most if excess(most) >= LONG else 10]
    seconds = sum(lasted for lasted, _, _ in taken)
    area = sum(ran for _, _, ran in taken)
    whole = sum(curve.area(end) - curve.area(begin) for (begin, end), curve in parts)
    return Tail(
        sequences=len(ends),
        last=sum(last for _, last, _ in taken),
        seconds=seconds / 1e9,
        generation_seconds=generation / 1e9,
        running=area / seconds if seconds else 0.0,
        peak=max(curve.peak() for _, curve in parts),
        mean=whole / generation,
    )


def merged(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches of time in order, those that overlap or touch as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(stretches):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _parts(
    starts: Sequence[int], ends: Sequence[int], calls: Sequence[tuple[int, int]]
) -> list[tuple[tuple[int, int], Curve]]:
    together = merged([*calls, *zip(starts, ends, strict=True)])
    begins = [begin for begin, _ in together]
    split: list[tuple[list[int], list[int]]] = [([], []) for _ in together]
    for start, end in zip(starts, ends, strict=True):
        own = split[max(bisect_left(begins, start + 1) - 1, 0)]
        own[0].append(start)
        own[1].append(end)
    return [(stretch, Curve(*own)) for stretch, own in zip(together, split, strict=True) if stretch[1] > stretch[0]]


def _after(part: tuple[tuple[int, int], Curve], percent: int) -> tuple[int, int, int]:
    """How long the last `percent` of sequences ran alone, how many they were, and their own time in it."""
    (_, end), curve = part
    last = math.ceil(len(curve.ends) * percent / 100)
    if last >= len(curve.ends):
        return 0, 0, 0
    since = curve.ends[-last - 1]
    return end - since, last, curve.area(end) - curve.area(since)
