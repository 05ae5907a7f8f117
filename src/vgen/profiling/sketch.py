"""Aggregates of one step, or of a whole run: mergeable, never an average of percentiles."""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .records import Instrument

if TYPE_CHECKING:
    from ddsketch import DDSketch
    from ddsketch.mapping import LogarithmicMapping

ACCURACY = 0.005
"""The relative error of a percentile."""

_FOLD = 4096


class Histogram:
    """Count, sum, extremes and percentiles of a stream of values, in memory that does not grow with it.

    Percentiles come from DDSketch (Masson, Rim, Lee, VLDB 2019): merging two sketches gives exactly the
    sketch of all their values. NaN and infinities are counted in `nonfinite` and left out of the rest.
    """

    __slots__ = ("_pending", "_sketch", "count", "maximum", "minimum", "nonfinite", "total")

    def __init__(self) -> None:
        self.count = self.nonfinite = 0
        self.total = 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self._pending: list[float] = []
        self._sketch: DDSketch | None = None

    def add(self, value: float) -> None:
        """Take one value. Cheap: the sketch is brought up to date in batches."""
        self._pending.append(value)
        if len(self._pending) >= _FOLD:
            self._fold()

    def extend(self, values: Iterable[float]) -> None:
        """Take many values."""
        self._pending.extend(values)
        if len(self._pending) >= _FOLD:
            self._fold()

    def merge(self, other: Histogram) -> None:
        """Take all that `other` has taken."""
        self._fold()
        other._fold()
        self.nonfinite += other.nonfinite
        if not other.count or other._sketch is None:
            return
        self.count += other.count
        self.total += other.total
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self._ensure().merge(other._sketch)

    def quantile(self, q: float) -> float:
        """The value below which the fraction `q` lies, to within `ACCURACY`; NaN when there is none."""
        self._fold()
        value = self._sketch.get_quantile_value(q) if self._sketch is not None else None
        return math.nan if value is None else min(max(value, self.minimum), self.maximum)

    def summary(self, name: str) -> dict[str, float]:
        """`<name>.count`, `.sum`, `.min`, `.max`, `.p50`, `.p90`, `.p99`, and `.nonfinite` where there were any."""
        self._fold()
        found: dict[str, float] = {f"{name}.nonfinite": self.nonfinite} if self.nonfinite else {}
        if self.count:
            found |= {
                f"{name}.count": self.count,
                f"{name}.sum": self.total,
                f"{name}.min": self.minimum,
                f"{name}.max": self.maximum,
                f"{name}.p50": self.quantile(0.5),
                f"{name}.p90": self.quantile(0.9),
                f"{name}.p99": self.quantile(0.99),
            }
        return found

    def _ensure(self) -> DDSketch:
        if self._sketch is None:
            from ddsketch import DDSketch  # a tenth of `import vgen`'s budget, so not at import

            self._sketch = DDSketch(ACCURACY)
        return self._sketch

    def _fold(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        finite = [value for value in pending if math.isfinite(value)]
        self.nonfinite += len(pending) - len(finite)
        if not finite:
            return
        self.count += len(finite)
        self.total += math.fsum(finite)
        self.minimum, self.maximum = min(self.minimum, *finite), max(self.maximum, *finite)
        sketch = self._ensure()
        positive = [value for value in finite if value > 0]
        if len(positive) < len(finite):
            for value in finite:
                if value <= 0:
                    sketch.add(value)
        # Values of one bucket go in together: the sketch's own bookkeeping costs more than finding the bucket.
        mapping = _mapping()
        for bucket, count in Counter(map(mapping.key, positive)).items():
            sketch.add(mapping.value(bucket), count)


@functools.cache
def _mapping() -> LogarithmicMapping:
    """Values to buckets, as every sketch of this accuracy maps them."""
    from ddsketch.mapping import LogarithmicMapping

    return LogarithmicMapping(ACCURACY)


class Row:
    """What was measured while a step was open (or in a whole run), by instrument name.

    Taking a value is one append, safe from any thread; aggregation happens when somebody looks.
    """

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Lock()
        # A deque, emptied from the left: a thread that appends meanwhile loses nothing.
        self._pending: deque[tuple[str, float] | tuple[Instrument, Sequence[float]]] = deque()
        self._histograms: dict[str, Histogram] = {}
        self._totals: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._fixed: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """Take one value of the histogram `name`."""
        self._pending.append((name, value))
        if len(self._pending) >= _FOLD:
            self._settle()

    def record(self, instrument: Instrument, values: Sequence[float]) -> None:
        """Take values of `instrument`."""
        self._pending.append((instrument, values))
        if len(self._pending) >= _FOLD:
            self._settle()

    def merge(self, other: Row) -> None:
        """Take all that `other` has: histograms merged, counters added, the other's gauges the later ones."""
        self._settle()
        other._settle()
        with self._lock, other._lock:
            for name, histogram in other._histograms.items():
                self._histograms.setdefault(name, Histogram()).merge(histogram)
            for name, value in other._totals.items():
                self._totals[name] = self._totals.get(name, 0) + value
            self._gauges |= other._gauges

    def histogram(self, name: str) -> Histogram | None:
        """The histogram of that name, where there is one: for sinks that draw distributions."""
        self._settle()
        return self._histograms.get(name)

    def close(self) -> None:
        """Fix the summary."""
        if not self.closed:
            self._fixed = self.summary()
            self.closed = True

    def summary(self) -> dict[str, float]:
        """A flat dict of all aggregates, as of now or as of the close."""
        if self.closed:
            return dict(self._fixed)
        self._settle()
        with self._lock:
            flat = self._totals | self._gauges
            for name, histogram in self._histograms.items():
                flat |= histogram.summary(name)
            return flat

    def _settle(self) -> None:
        with self._lock:
            pending, singles = self._pending, dict[str, list[float]]()
            while pending:
                what, value = pending.popleft()
                if isinstance(what, str):
                    singles.setdefault(what, []).append(value)  # type: ignore[arg-type]
                elif what.kind == "histogram":
                    self._histograms.setdefault(what.name, Histogram()).extend(value)  # type: ignore[arg-type]
                elif what.kind == "counter":
                    self._totals[what.name] = self._totals.get(what.name, 0) + sum(value)  # type: ignore[arg-type]
                else:
                    self._gauges[what.name] = value[-1]  # type: ignore[index]
            for name, values in singles.items():
                self._histograms.setdefault(name, Histogram()).extend(values)
