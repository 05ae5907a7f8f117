"""Aggregates of one step, or of a whole run: mergeable, never an average of percentiles."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .records import Instrument

if TYPE_CHECKING:
    from ddsketch.ddsketch import BaseDDSketch
    from ddsketch.store import DenseStore

ACCURACY = 0.005
"""The relative error of a percentile."""

_FOLD = 4096

_lock = threading.RLock()  # re-entrant: a signal handler may take a value while its thread settles a row


def _unlock() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it when the process was forked


os.register_at_fork(after_in_child=_unlock)


class Histogram:
    """Count, sum, extremes and percentiles of a stream of values, in memory that does not grow with it.

    Percentiles come from DDSketch (Masson, Rim, Lee, VLDB 2019): merging two sketches gives exactly the
    sketch of all their values. NaN and infinities are counted in `nonfinite` and left out of the rest.
    """

    __slots__ = ("_negative", "_positive", "_sketch", "count", "maximum", "minimum", "nonfinite", "total")

    def __init__(self) -> None:
        library = load()
        self.count = self.nonfinite = 0
        self.total = 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self._positive, self._negative = library.store(), library.store()
        self._sketch = library.sketch(library.mapping, self._positive, self._negative, 0.0)

    def add(self, value: float) -> None:
        """Take one value."""
        self.extend((value,))

    def extend(self, values: Sequence[float]) -> None:
        """Take many values: together they cost far less than one by one."""
        finite = values
        if not math.isfinite(sum(values)):
            finite = [value for value in values if math.isfinite(value)]
            self.nonfinite += len(values) - len(finite)
        if not finite:
            return
        try:
            total = math.fsum(finite)
        except OverflowError:
            total = sum(finite)
        lowest, highest = min(finite), max(finite)
        self._count(len(finite), total, lowest, highest)
        if highest > 0:
            self._sketch_all([value for value in finite if value > 0], 1)
        if lowest < 0:
            self._sketch_all([-value for value in finite if value < 0], -1)
        if zeros := finite.count(0):
            self._sketch.add(0.0, zeros)

    def merge(self, other: Histogram) -> None:
        """Take all that `other` has taken."""
        self.nonfinite += other.nonfinite
        if other.count:
            self._count(other.count, other.total, other.minimum, other.maximum)
            self._sketch.merge(other._sketch)

    def quantile(self, q: float) -> float:
        """The value below which the fraction `q` lies, to within `ACCURACY`; NaN when there is none."""
        value = self._sketch.get_quantile_value(q)
        return math.nan if value is None else min(max(value, self.minimum), self.maximum)

    def summary(self, name: str) -> dict[str, float]:
        """`<name>.count`, `.sum`, `.min`, `.max`, `.p50`, `.p90`, `.p99`, and `.nonfinite` where there were any."""
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

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it: buckets of the sketch as pairs of key and count."""
        extremes = {"min": self.minimum, "max": self.maximum} if self.count else {}
        return {
            "count": self.count,
            "nonfinite": self.nonfinite,
            "sum": _spoken(self.total),
            **extremes,
            "zeros": self.count - int(self._positive.count + self._negative.count),
            "positive": _bins(self._positive),
            "negative": _bins(self._negative),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Histogram:
        """What `to_dict` gave."""
        made, mapping = cls(), load().mapping
        made.nonfinite = data["nonfinite"]
        if data["count"]:
            made._count(data["count"], float(data["sum"]), data["min"], data["max"])
            if data["zeros"]:
                made._sketch.add(0.0, data["zeros"])
            for sign, side in ((1, "positive"), (-1, "negative")):
                for key, count in data[side]:
                    made._sketch.add(sign * mapping.value(key), count)
        return made

    def _count(self, count: int, total: float, minimum: float, maximum: float) -> None:
        self.count += count
        self.total += total
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)

    def _sketch_all(self, magnitudes: list[float], sign: int) -> None:
        # Values of one bucket go in together: the sketch's own bookkeeping costs more than finding the bucket.
        library = load()
        mapping, scale, top = library.mapping, library.scale, library.top
        ceil, log2 = math.ceil, math.log2
        for key, count in Counter([ceil(log2(value) * scale) for value in magnitudes]).items():
            self._sketch.add(sign * mapping.value(min(key, top)), count)


@dataclass(frozen=True, slots=True)
class _Library:
    sketch: type[BaseDDSketch]
    store: type[DenseStore]
    mapping: Any
    """Values to buckets, as every sketch of this accuracy maps them."""
    scale: float
    """What a value's binary logarithm is multiplied with to give its bucket."""
    top: int
    """The last bucket whose value is finite."""


@functools.cache
def load() -> _Library:
    """The sketch library. It is imported when a context is made, not by whichever thread measures first.

    At `import vgen` it would cost a tenth of the budget; in the middle of an import a fork leaves a child
    that waits for the module for ever.
    """
    from ddsketch.ddsketch import BaseDDSketch
    from ddsketch.mapping import LogarithmicMapping
    from ddsketch.store import DenseStore

    mapping = LogarithmicMapping(ACCURACY)
    scale = 1 / math.log2(mapping.gamma)
    return _Library(BaseDDSketch, DenseStore, mapping, scale, math.floor(1024 * scale) - 1)


def _bins(store: DenseStore) -> list[tuple[int, int]]:
    return [(store.offset + index, int(count)) for index, count in enumerate(store.bins) if count]


def _spoken(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no such numbers; `float` reads them back


class Row:
    """What was measured while a step was open (or in a whole run), by instrument name.

    Taking a value is one append, safe from any thread; aggregation happens when somebody looks. What
    comes after `close` goes to `heir`. Ranks merge theirs exactly, percentiles too:

        total = Row()
        for part in gathered:  # each rank's `step.row.to_dict()`
            total.merge(Row.from_dict(part))
    """

    def __init__(self, heir: Row | None = None) -> None:
        # Deques, emptied from the left: a thread that appends meanwhile loses nothing.
        self._seconds: deque[tuple[str, float]] = deque()
        self._values: deque[tuple[Instrument, Sequence[float]]] = deque()
        self._histograms: dict[str, Histogram] = {}
        self._totals: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._fixed: dict[str, float] | None = None
        self._heir = heir
        self._folder = 0
        """The thread that is folding."""

    @property
    def closed(self) -> bool:
        """Whether the summary is fixed."""
        return self._fixed is not None

    def add(self, span_name: str, seconds: float) -> None:
        """Take the duration of a span, into the histogram `<span name>.duration`."""
        self._seconds.append((span_name, seconds))
        # After the append: a value that comes while the row is being closed is then seen by one side or the other.
        if len(self._seconds) >= _FOLD or self._fixed is not None:
            self._settle()

    def record(self, instrument: Instrument, values: Sequence[float]) -> None:
        """Take values of `instrument`."""
        self._values.append((instrument, values))
        if len(self._values) >= _FOLD or self._fixed is not None:
            self._settle()

    def merge(self, other: Row) -> None:
        """Take all that `other` has: histograms merged, counters added, the other's gauges the later ones."""
        with _lock:
            other._settle()
            self._settle()
            with self._folding():
                for name, histogram in other._histograms.items():
                    self._histogram(name).merge(histogram)
                for name, value in other._totals.items():
                    self._totals[name] = self._totals.get(name, 0) + value
                self._gauges |= other._gauges

    def histogram(self, name: str) -> Histogram | None:
        """The histogram of that name, where there is one: for sinks that draw distributions."""
        self._settle()
        return self._histograms.get(name)

    def close(self) -> None:
        """Fix the summary."""
        with _lock:
            if self._fixed is None:
                self._fixed = self.summary()

    def summary(self) -> dict[str, float]:
        """A flat dict of all aggregates, as of now or as of the close."""
        with _lock:
            if self._fixed is not None:
                return dict(self._fixed)
            self._settle()
            flat = self._totals | self._gauges
            for name, histogram in self._histograms.items():
                flat |= histogram.summary(name)
            return flat

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it, for another process to merge."""
        with _lock:
            self._settle()
            return {
                "accuracy": ACCURACY,
                "counters": {name: _spoken(value) for name, value in self._totals.items()},
                "gauges": {name: _spoken(value) for name, value in self._gauges.items()},
                "histograms": {name: histogram.to_dict() for name, histogram in self._histograms.items()},
            }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """What `to_dict` gave. `ValueError` when it comes from a vgen with another accuracy: it cannot be merged."""
        if data["accuracy"] != ACCURACY:
            raise ValueError(f"sketches of accuracy {data['accuracy']} and {ACCURACY} cannot be merged")
        made = cls()
        made._totals = {name: float(v) if isinstance(v, str) else v for name, v in data["counters"].items()}
        made._gauges = {name: float(v) if isinstance(v, str) else v for name, v in data["gauges"].items()}
        made._histograms = {name: Histogram.from_dict(value) for name, value in data["histograms"].items()}
        return made

    def _histogram(self, name: str) -> Histogram:
        found = self._histograms.get(name)
        if found is None:
            found = self._histograms[name] = Histogram()
        return found

    @contextmanager
    def _folding(self) -> Generator[None]:
        """Within it what a signal handler brings to this thread waits, else it would be written over afterwards."""
        self._folder = threading.get_ident()  # in a forked child no other thread's matters
        try:
            yield
        finally:
            self._folder = 0

    def _settle(self) -> None:
        with _lock:
            if self._folder == threading.get_ident():
                return
            with self._folding():
                self._fold()

    def _fold(self) -> None:
        if self._fixed is not None and self._heir is not None:
            while self._seconds:
                self._heir.add(*self._seconds.popleft())
            while self._values:
                self._heir.record(*self._values.popleft())
            return
        taken: dict[str, list[float]] = {}
        while self._seconds:
            name, seconds = self._seconds.popleft()
            taken.setdefault(name, []).append(seconds)
        taken = {f"{name}.duration": values for name, values in taken.items()}
        while self._values:
            instrument, values = self._values.popleft()
            if instrument.kind == "histogram":
                taken.setdefault(instrument.name, []).extend(values)
            elif instrument.kind == "gauge":
                self._gauges[instrument.name] = values[-1]
            else:
                self._add_up(instrument.name, values)
        for name, values in taken.items():
            self._histogram(name).extend(values)

    def _add_up(self, name: str, values: Sequence[float]) -> None:
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            self._totals[name] = self._totals.get(name, 0) + sum(finite)
        if len(finite) < len(values):
            strange = f"{name}.nonfinite"
            self._totals[strange] = self._totals.get(strange, 0) + len(values) - len(finite)
