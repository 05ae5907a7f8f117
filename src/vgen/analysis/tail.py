"""How many requests ran at once, and what the last ones cost."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

PERCENTS = 50
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
        which = f"{percent} of" if self.sequences >= 100 else f"{self.last} of {self.sequences}"
        return f"the last {which} sequences {took}, {self.running:.1f} running on average where {self.peak} had run"


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


class Tails:
    """What the last 1, 2, … 50 % of a generation's sequences cost, so that generations can be added up.

    `starts`, `ends` and `calls` are nanoseconds of one clock. Calls that overlap are one generation; of those one
    after the other each has a tail of its own.
    """

    def __init__(
        self, starts: Sequence[int] = (), ends: Sequence[int] = (), calls: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.sequences, self.generation, self.ran, self.peak = len(ends), 0, 0, 0
        self._last, self._after, self._alone = [0] * PERCENTS, [0] * PERCENTS, [0] * PERCENTS
        for length, curve in _parts(starts, ends, calls):
            self.generation += length
            self.ran += curve.area(length)
            self.peak = max(self.peak, curve.peak())
            for percent in range(PERCENTS):
                last = math.ceil(len(curve.ends) * (percent + 1) / 100)
                if last < len(curve.ends):
                    since = curve.ends[-last - 1]
                    self._last[percent] += last
                    self._after[percent] += length - since
                    self._alone[percent] += curve.area(length) - curve.area(since)

    def add(self, other: Tails) -> None:
        """Take another generation's as well."""
        self.sequences += other.sequences
        self.generation += other.generation
        self.ran += other.ran
        self.peak = max(self.peak, other.peak)
        for mine, theirs in ((self._last, other._last), (self._after, other._after), (self._alone, other._alone)):
            mine[:] = map(sum, zip(mine, theirs, strict=True))

    def tail(self) -> Tail | None:
        """The tail where it is longest for its number of sequences, or a tenth of them; None where none were timed."""
        if not self.sequences or not self.generation:
            return None

        def excess(percent: int) -> float:
            return self._after[percent] / self.generation - self._last[percent] / self.sequences

        most = max(range(PERCENTS), key=excess)
        chosen = most if excess(most) >= LONG else 9
        seconds = self._after[chosen]
        return Tail(
            sequences=self.sequences,
            last=self._last[chosen],
            seconds=seconds / 1e9,
            generation_seconds=self.generation / 1e9,
            running=self._alone[chosen] / seconds if seconds else 0.0,
            peak=self.peak,
            mean=self.ran / self.generation,
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


def _parts(starts: Sequence[int], ends: Sequence[int], calls: Sequence[tuple[int, int]]) -> list[tuple[int, Curve]]:
    """Each generation's length and its curve, from 0 on."""
    if not ends:
        return []
    together = merged(calls)
    first, last = min(starts), max(ends)
    if not together or first < together[0][0] or last > together[-1][1]:
        together = merged([*together, *zip(starts, ends, strict=True)])
    if len(together) == 1:
        begin, end = together[0]
        return [(end - begin, Curve([start - begin for start in starts], [end - begin for end in ends]))]
    begins = [begin for begin, _ in together]
    split: list[tuple[list[int], list[int]]] = [([], []) for _ in together]
    for start, end in zip(starts, ends, strict=True):
        index = max(bisect_right(begins, start) - 1, 0)
        split[index][0].append(start - begins[index])
        split[index][1].append(end - begins[index])
    parts = zip(together, split, strict=True)
    return [(end - begin, Curve(*own)) for (begin, end), own in parts if own[1] and end > begin]
