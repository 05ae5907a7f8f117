"""How many requests ran at once, and what the last ones cost."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

PERCENTS = 50
"""A tail is at most this share of the sequences."""
LONG = 0.1
"""The last sequences are called a tail if their share of the time is larger than their share of the sequences, by at
least this much."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What the last sequences of a generation cost. Calls that followed each other count together."""

    sentence: str = field(init=False)
    """For example: `the last 3 % of sequences took 41 % of generation (…)`."""
    long: bool = field(init=False)
    """Whether it is worth a mention: see `LONG`."""
    sequences: int
    last: int
    """How many sequences make up the tail."""
    share: float = field(init=False)
    """`seconds` as a part of `generation_seconds`."""
    seconds: float
    """How long only the `last` sequences, or fewer, ran."""
    generation_seconds: float
    running: float
    """How many sequences ran at once during the tail, on average."""
    peak: int
    """How many ran at once at most."""
    mean: float
    """How many ran at once over the whole generation, on average."""

    def __post_init__(self) -> None:
        share = self.seconds / self.generation_seconds if self.generation_seconds else 0.0
        long = share - self.last / self.sequences >= LONG
        took = f"took {100 * share:.0f} % of generation ({self.seconds:.2f} of {self.generation_seconds:.2f} s)"
        percent = f"{max(100 * self.last / self.sequences, 1):.0f} %"
        which = f"{percent} of" if self.sequences >= 100 else f"{self.last} of {self.sequences}"
        running = f"{self.running:.1f} running on average where {self.peak} had run"
        sentence = f"the last {which} sequences {took}, {running}"
        if not long:
            sentence = f"no long tail: the last {percent} of sequences {took}"
        for name, value in (("sentence", sentence), ("long", long), ("share", share)):
            object.__setattr__(self, name, value)


class Curve:
    """How many of some requests ran, as a function of time. Times are integers of any one unit."""

    def __init__(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        self.starts, self.ends = sorted(starts), sorted(ends)
        self._started = [0, *accumulate(self.starts)]
        self._ended = [0, *accumulate(self.ends)]

    def area(self, time: int) -> int:
        """For how long all requests together had run at `time`: the area under the curve."""
        started, ended = bisect_left(self.starts, time), bisect_left(self.ends, time)
        return started * time - self._started[started] - (ended * time - self._ended[ended])

    def mean(self, begin: int, end: int) -> float:
        """How many ran between two times, on average."""
        return (self.area(end) - self.area(begin)) / (end - begin) if end > begin else 0.0

    def bins(self, begin: int, end: int, number: int) -> list[float]:
        """The mean of each of `number` equal stretches of time."""
        edges = [begin + (end - begin) * index // number for index in range(number + 1)]
        areas = zip(edges, map(self.area, edges), strict=True)
        return [(b - a) / (end - start) if end > start else 0.0 for (start, a), (end, b) in pairwise(areas)]

    def peak(self) -> int:
        """How many ran at once at most."""
        ended = most = 0
        for started, start in enumerate(self.starts, 1):
            while ended < len(self.ends) and self.ends[ended] <= start:
                ended += 1
            most = max(most, started - ended)
        return most


class Tails:
    """What the last 1, 2, … 50 % of the sequences cost, in a form in which generations can be added up.

    `starts` and `ends` of the sequences, and the `calls` that generated them, are nanoseconds of one clock. Calls that
    overlap are one generation. Of calls that follow each other, each has a tail of its own.
    """

    def __init__(
        self, starts: Sequence[int] = (), ends: Sequence[int] = (), calls: Sequence[tuple[int, int]] = ()
    ) -> None:
        self._sequences, self._generation, self._ran, self._peak = len(ends), 0, 0, 0
        self._last, self._tail, self._tail_ran = [0] * PERCENTS, [0] * PERCENTS, [0] * PERCENTS
        """By percentage: sequences in the tail, its nanoseconds, and the nanoseconds of all sequences in it."""
        for length, curve in _generations(starts, ends, calls):
            self._generation += length
            self._ran += curve.area(length)
            self._peak = max(self._peak, curve.peak())
            for percent in range(PERCENTS):
                last = math.ceil(len(curve.ends) * (percent + 1) / 100)
                if last < len(curve.ends):
                    since = curve.ends[-last - 1]
                    self._last[percent] += last
                    self._tail[percent] += length - since
                    self._tail_ran[percent] += curve.area(length) - curve.area(since)

    def add(self, other: Tails) -> None:
        """Add another generation to this one."""
        self._sequences += other._sequences
        self._generation += other._generation
        self._ran += other._ran
        self._peak = max(self._peak, other._peak)
        for own, more in ((self._last, other._last), (self._tail, other._tail), (self._tail_ran, other._tail_ran)):
            own[:] = map(sum, zip(own, more, strict=True))

    def tail(self) -> Tail | None:
        """The tail that is longest for its number of sequences. None where no sequence was timed.

        Where no tail is long (see `LONG`), it is that of the last tenth.
        """
        if not self._sequences or not self._generation:
            return None

        def excess(percent: int) -> float:
            return self._tail[percent] / self._generation - self._last[percent] / self._sequences

        longest = max(range(PERCENTS), key=excess)
        chosen = longest if excess(longest) >= LONG else 9
        return Tail(
            self._sequences,
            self._last[chosen],
            self._tail[chosen] / 1e9,
            self._generation / 1e9,
            self._tail_ran[chosen] / self._tail[chosen] if self._tail[chosen] else 0.0,
            self._peak,
            self._ran / self._generation,
        )


def merged(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches of time in order. Those that overlap or touch become one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(stretches):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _generations(
    starts: Sequence[int], ends: Sequence[int], calls: Sequence[tuple[int, int]]
) -> list[tuple[int, Curve]]:
    """The length of each generation, and its curve from time 0 on."""
    if not ends:
        return []
    stretches = merged(calls)
    if not stretches or min(starts) < stretches[0][0] or max(ends) > stretches[-1][1]:
        stretches = merged([*stretches, *zip(starts, ends, strict=True)])
    if len(stretches) == 1:  # the usual case, three times as fast as below
        begin, end = stretches[0]
        return [(end - begin, Curve([start - begin for start in starts], [end - begin for end in ends]))]
    begins = [begin for begin, _ in stretches]
    split: list[tuple[list[int], list[int]]] = [([], []) for _ in stretches]
    for start, end in zip(starts, ends, strict=True):
        index = max(bisect_right(begins, start) - 1, 0)
        split[index][0].append(start - begins[index])
        split[index][1].append(end - begins[index])
    parts = zip(stretches, split, strict=True)
    return [(end - begin, Curve(*times)) for (begin, end), times in parts if times[1] and end > begin]
