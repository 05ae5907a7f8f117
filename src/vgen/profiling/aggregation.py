"""Aggregates of one step, or of a whole run. They can be merged exactly; percentiles are never averaged."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .measurement import Instrument

if TYPE_CHECKING:
    from ddsketch.mapping import LogarithmicMapping
    from ddsketch.store import DenseStore

ACCURACY = 0.005
"""The relative error of a percentile."""

_MAX_PENDING = 4096
"""Records that a row collects before it aggregates them."""

_lock = threading.RLock()  # re-entrant: a signal handler may record a value while its thread closes a row


def _replace_lock() -> None:
    global _lock
    _lock = threading.RLock()  # when the process was forked, another thread may have held the old one


os.register_at_fork(after_in_child=_replace_lock)


class Histogram:
    """Count, sum, minimum, maximum and percentiles of a stream of values. Memory does not grow with the stream.

    Percentiles come from DDSketch (Masson, Rim, Lee, VLDB 2019, https://arxiv.org/abs/1908.10693): merging two
    sketches gives exactly the sketch of all their values. NaN and infinities are counted in `nonfinite` only.
    """

    __slots__ = ("_negative", "_positive", "_sketch", "count", "maximum", "minimum", "nonfinite", "total")

    def __init__(self) -> None:
        from ddsketch.ddsketch import BaseDDSketch
        from ddsketch.store import DenseStore

        self.count = self.nonfinite = 0
        self.total = 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self._positive, self._negative = DenseStore(), DenseStore()
        self._sketch = BaseDDSketch(load_ddsketch(), self._positive, self._negative, 0.0)

    def extend(self, values: Sequence[float]) -> None:
        """Add values. One call for many costs far less than a call for each."""
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
        self._update(len(finite), total, lowest, highest)
        if highest > 0:
            self._add_to_sketch([value for value in finite if value > 0], 1)
        if lowest < 0:
            self._add_to_sketch([-value for value in finite if value < 0], -1)
        if zeros := finite.count(0):
            self._sketch.add(0.0, zeros)

    def merge(self, other: Histogram) -> None:
        """Add all values of `other`."""
        self.nonfinite += other.nonfinite
        if other.count:
            self._update(other.count, other.total, other.minimum, other.maximum)
            self._sketch.merge(other._sketch)

    def quantile(self, q: float) -> float:
        """Return the value that the fraction `q` of all values is below, to within `ACCURACY`; NaN without values."""
        value = self._sketch.get_quantile_value(q)
        return math.nan if value is None else min(max(value, self.minimum), self.maximum)

    def summary(self, name: str) -> dict[str, float]:
        """Return `<name>.count`, `.sum`, `.min`, `.max`, `.p50`, `.p90`, `.p99`, and `.nonfinite` if there were any."""
        flat: dict[str, float] = {f"{name}.nonfinite": self.nonfinite} if self.nonfinite else {}
        if self.count:
            extremes = {"count": self.count, "sum": self.total, "min": self.minimum, "max": self.maximum}
            percentiles = {f"p{percent}": self.quantile(percent / 100) for percent in (50, 90, 99)}
            flat |= {f"{name}.{figure}": value for figure, value in (extremes | percentiles).items()}
        return flat

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; the sketch's buckets are pairs of key and count."""
        extremes = {"min": self.minimum, "max": self.maximum} if self.count else {}
        return {
            "count": self.count,
            "nonfinite": self.nonfinite,
            "sum": _json_number(self.total),
            **extremes,
            "zeros": self.count - int(self._positive.count + self._negative.count),
            "positive": _buckets(self._positive),
            "negative": _buckets(self._negative),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Histogram:
        """Build a histogram from what `to_dict` returned."""
        histogram, mapping = cls(), load_ddsketch()
        histogram.nonfinite = data["nonfinite"]
        if data["count"]:
            histogram._update(data["count"], float(data["sum"]), data["min"], data["max"])
            if data["zeros"]:
                histogram._sketch.add(0.0, data["zeros"])
            for sign, side in ((1, "positive"), (-1, "negative")):
                for key, count in data[side]:
                    histogram._sketch.add(sign * mapping.value(key), count)
        return histogram

    def _update(self, count: int, total: float, minimum: float, maximum: float) -> None:
        self.count += count
        self.total += total
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)

    def _add_to_sketch(self, magnitudes: list[float], sign: int) -> None:
        # One `add` for each bucket, not for each value: the sketch's bookkeeping costs more than finding the bucket.
        mapping, ceil, log2 = load_ddsketch(), math.ceil, math.log2
        # The binary logarithm of a value times `scale`, rounded up, is the key of its bucket.
        scale = 1 / log2(mapping.gamma)
        top = math.floor(1024 * scale) - 1  # the last bucket whose value is finite
        for key, count in Counter([ceil(log2(value) * scale) for value in magnitudes]).items():
            self._sketch.add(sign * mapping.value(min(key, top)), count)


@functools.cache
def load_ddsketch() -> LogarithmicMapping:
    """Import the sketch library, and return the mapping from values to buckets: the same for all sketches.

    Called when a context is made, not by whichever thread measures first. At `import vgen` it would take a tenth of the
    time allowed. A process that forks in the middle of an import leaves a child that waits for the module forever.
    """
    from ddsketch.mapping import LogarithmicMapping

    return LogarithmicMapping(ACCURACY)


def _buckets(store: DenseStore) -> list[tuple[int, int]]:
    return [(store.offset + index, int(count)) for index, count in enumerate(store.bins) if count]


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no such numbers; `float` reads the string


def _from_json(numbers: Mapping[str, float | str]) -> dict[str, float]:
    return {name: float(value) if isinstance(value, str) else value for name, value in numbers.items()}


class Row:
    """What was measured while a step was open, or in a whole run, by instrument name.

    Recording a value is one append, from any thread; aggregation happens when somebody reads. A value that arrives
    after `close` goes to `successor`. Rows of several ranks merge exactly, percentiles included:

        total = Row()
        for part in gathered:  # each rank's `step.row.to_dict()`
            total.merge(Row.from_dict(part))
    """

    def __init__(self, successor: Row | None = None) -> None:
        # Deques, emptied from the left: what another thread appends meanwhile is not lost.
        self._seconds: deque[tuple[str, float]] = deque()
        self._values: deque[tuple[Instrument, Sequence[float]]] = deque()
        self._histograms = defaultdict[str, Histogram](Histogram)
        self._totals: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._final: dict[str, float] | None = None
        self._successor = successor
        self._aggregating_thread = 0

    def add(self, span_name: str, seconds: float) -> None:
        """Add the duration of a span to the histogram `<span name>.duration`."""
        self._seconds.append((span_name, seconds))
        # After the append: while another thread closes the row, one of the two threads then sees the value.
        if len(self._seconds) >= _MAX_PENDING or self._final is not None:
            self._aggregate()

    def record(self, instrument: Instrument, values: Sequence[float]) -> None:
        """Add values of `instrument`."""
        self._values.append((instrument, values))
        if len(self._values) >= _MAX_PENDING or self._final is not None:
            self._aggregate()

    def merge(self, other: Row) -> None:
        """Add everything from `other`: merge histograms, add counters; gauges take the value of `other`."""
        with _lock:
            other._aggregate()
            self._aggregate()
            with self._marked_as_aggregating():
                for name, histogram in other._histograms.items():
                    self._histograms[name].merge(histogram)
                for name, value in other._totals.items():
                    self._totals[name] = self._totals.get(name, 0) + value
                self._gauges |= other._gauges

    def histogram(self, name: str) -> Histogram | None:
        """Return the histogram `name`, or None; for sinks that draw distributions."""
        self._aggregate()
        return self._histograms.get(name)

    def close(self) -> None:
        """Make the summary final."""
        with _lock:
            if self._final is None:
                self._final = self.summary()

    def summary(self) -> dict[str, float]:
        """Return all aggregates as a flat dict: as they are now, or as they were at `close`."""
        with _lock:
            if self._final is not None:
                return dict(self._final)
            self._aggregate()
            flat = self._totals | self._gauges
            for name, histogram in self._histograms.items():
                flat |= histogram.summary(name)
            return flat

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, for another process to merge."""
        with _lock:
            self._aggregate()
            return {
                "accuracy": ACCURACY,
                "counters": {name: _json_number(value) for name, value in self._totals.items()},
                "gauges": {name: _json_number(value) for name, value in self._gauges.items()},
                "histograms": {name: histogram.to_dict() for name, histogram in self._histograms.items()},
            }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Build a row from what `to_dict` returned.

        Raises:
            ValueError: The data comes from a version of vgen with another accuracy, so it cannot be merged.
        """
        if data["accuracy"] != ACCURACY:
            raise ValueError(f"sketches of accuracy {data['accuracy']} and {ACCURACY} cannot be merged")
        row = cls()
        row._totals, row._gauges = _from_json(data["counters"]), _from_json(data["gauges"])
        row._histograms |= {name: Histogram.from_dict(value) for name, value in data["histograms"].items()}
        return row

    @contextmanager
    def _marked_as_aggregating(self) -> Generator[None]:
        """A signal handler may record a value on this thread meanwhile. Mark the thread, so that such a value waits:
        a nested aggregation would be overwritten by this one."""
        self._aggregating_thread = threading.get_ident()  # after a fork only the mark of this thread matters
        try:
            yield
        finally:
            self._aggregating_thread = 0

    def _aggregate(self) -> None:
        """Aggregate what was recorded since the last time."""
        with _lock:
            if self._aggregating_thread == threading.get_ident():
                return
            with self._marked_as_aggregating():
                self._aggregate_pending()

    def _aggregate_pending(self) -> None:
        if self._final is not None and self._successor is not None:
            while self._seconds:
                self._successor.add(*self._seconds.popleft())
            while self._values:
                self._successor.record(*self._values.popleft())
            return
        by_span: dict[str, list[float]] = {}
        while self._seconds:
            name, seconds = self._seconds.popleft()
            by_span.setdefault(name, []).append(seconds)
        by_name = {f"{name}.duration": values for name, values in by_span.items()}
        while self._values:
            instrument, values = self._values.popleft()
            if instrument.kind == "histogram":
                by_name.setdefault(instrument.name, []).extend(values)
            elif instrument.kind == "gauge":
                self._gauges[instrument.name] = values[-1]
            else:
                self._add_to_total(instrument.name, values)
        for name, values in by_name.items():
            self._histograms[name].extend(values)

    def _add_to_total(self, name: str, values: Sequence[float]) -> None:
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            self._totals[name] = self._totals.get(name, 0) + sum(finite)
        if len(finite) < len(values):
            nonfinite = f"{name}.nonfinite"
            self._totals[nonfinite] = self._totals.get(nonfinite, 0) + len(values) - len(finite)
