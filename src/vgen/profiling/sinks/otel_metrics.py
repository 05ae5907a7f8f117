"""What is measured, as OpenTelemetry's instruments: the half of `OTelSink` that has to do with metrics."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from opentelemetry import metrics

from .. import names
from ..records import Attributes, Instrument, Measurement

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

logger = logging.getLogger("vgen.telemetry")

MAX_USER_SPANS = 64
"""Span names of the caller's own that get a duration histogram each. A name with a number in it has no bound."""

_VALID = re.compile(r"[A-Za-z][A-Za-z0-9_.\-/]{0,254}")
_numbers = itertools.count()

Timer: TypeAlias = Callable[[float, Attributes, "str | None", "Context"], None]
"""Takes a span's seconds, attributes and error, and the context that it was current in, for exemplars."""
_Take: TypeAlias = Callable[[Sequence[float], Attributes], None]


class OTelInstruments:
    """Gives each `Instrument` its counterpart of OpenTelemetry, with buckets that suit its unit, once.

    Only what `Instrument.attributes` lists becomes a label. A value that OpenTelemetry cannot hold (NaN,
    an infinity, and anything negative in a histogram or counter) is left out, counted in `refused` and
    reported once for each instrument.
    """

    def __init__(
        self, provider: MeterProvider | None, scope: str, version: str, conventions: Iterable[names.Convention]
    ) -> None:
        self.refused = 0
        self._provider = provider
        self._meter = metrics.get_meter(scope, version, provider)
        # OpenTelemetry keeps the callback of whoever is first to make a gauge in a scope: so each sink has its own.
        number = next(_numbers)
        self._gauge_meter = metrics.get_meter(
            scope, version, provider, attributes={names.SINK_NUMBER: number} if number else None
        )
        self._aliases = [alias for convention in conventions for alias in convention.metrics]
        self._takes: dict[tuple[str, object], _Take] = {}
        self._user_spans = 0
        self._gauges: dict[str, _Gauge] = {}
        self._reported: set[str] = set()

    def record(self, measurement: Measurement) -> None:
        """Hand the values on, also under the names that other conventions have for them."""
        instrument, attributes = measurement.instrument, measurement.attributes
        key = instrument.name, attributes.get(names.ENGINE)
        take = self._takes.get(key)
        if take is None:
            take = self._takes[key] = self._taker(instrument, key[1])
        take(measurement.values, attributes)

    @property
    def idle(self) -> bool:
        """Nobody takes what is measured: no provider was given, and there is no global one so far."""
        provider = self._provider or metrics.get_meter_provider()
        return type(provider).__module__.startswith("opentelemetry.metrics.")

    def timer(self, name: str) -> Timer | None:
        """What takes the seconds of each span called `name`; None where it gets no histogram."""
        instrument, spec = names.duration(name), names.SPANS.get(name)
        if spec is not None and spec.selected:
            return None
        if spec is None and not name.startswith(names.RESERVED):
            self._user_spans += 1
            if self._user_spans > MAX_USER_SPANS or not _VALID.fullmatch(instrument.name):
                return None
        record = _histogram(self._meter, instrument).record
        labels = tuple(label for label in instrument.attributes if label != names.ERROR_TYPE)

        def time(seconds: float, attributes: Attributes, error: str | None, context: Context) -> None:
            kept = _kept(labels, attributes) if labels else {}
            if error is not None:
                kept[names.ERROR_TYPE] = error
            record(seconds, kept, context)

        return time

    def observe(self, instrument: Instrument, read: Callable[[], float | None], attributes: Attributes) -> None:
        """Have `read` asked whenever metrics are collected, on whatever thread does that."""
        self._gauge(instrument).observe(_kept(instrument.attributes, attributes), read)

    def close(self) -> None:
        """Observe nothing any more: what is observed may be gone when its callback is still there."""
        for gauge in self._gauges.values():
            gauge.readers.clear()

    def _gauge(self, instrument: Instrument) -> _Gauge:
        gauge = self._gauges.get(instrument.name)
        if gauge is None:
            gauge = self._gauges[instrument.name] = _Gauge(instrument, self._report)
            self._gauge_meter.create_observable_gauge(
                instrument.name, [gauge.collect], instrument.unit, instrument.description
            )
        return gauge

    def _taker(self, instrument: Instrument, engine: object) -> _Take:
        puts = [self._putter(instrument, {})]
        puts += [
            self._putter(alias.instrument, alias.constant)
            for alias in self._aliases
            if alias.of == instrument.name and engine in alias.engines
        ]

        def take(values: Sequence[float], attributes: Attributes) -> None:
            good = self._good(instrument, values)
            if good:
                for put in puts:
                    put(good, attributes)

        return take

    def _putter(self, instrument: Instrument, constant: Mapping[str, str]) -> _Take:
        labels = tuple(label for label in instrument.attributes if label not in constant)
        if instrument.kind == "gauge":
            keep = self._gauge(instrument).keep
            return lambda values, attributes: keep(_kept(labels, attributes), values[-1])
        if instrument.kind == "counter":
            add = self._meter.create_counter(instrument.name, instrument.unit, instrument.description).add
            return lambda values, attributes: add(sum(values), {**constant, **_kept(labels, attributes)})
        record = _histogram(self._meter, instrument).record

        def put(values: Sequence[float], attributes: Attributes) -> None:
            own = {**constant, **_kept(labels, attributes)}
            for value in values:
                record(value, own)

        return put

    def _good(self, instrument: Instrument, values: Sequence[float]) -> Sequence[float]:
        least = -math.inf if instrument.kind == "gauge" else 0
        good = [value for value in values if least <= value < math.inf and value > -math.inf]
        if len(good) < len(values):
            self.refused += len(values) - len(good)
            self._report(instrument.name, f"{instrument.name} got values that are negative or not finite")
            return good
        return values

    def _report(self, name: str, problem: str) -> None:
        if name not in self._reported:
            self._reported.add(name)
            logger.warning("vgen: OpenTelemetry's metrics leave something out: %s", problem)


class _Gauge:
    """What observes a gauge, and the last values recorded where nothing does, by their labels.

    Not OpenTelemetry's gauge that is set: until its SDK 1.45 that one is gone after one collection.
    """

    def __init__(self, instrument: Instrument, report: Callable[[str, str], None]) -> None:
        self.readers: list[tuple[dict[str, Any], Callable[[], float | None]]] = []
        self._name, self._report = instrument.name, report
        self._last: dict[str, tuple[dict[str, Any], float]] = {}
        self._observed: set[str] = set()

    def observe(self, labels: dict[str, Any], read: Callable[[], float | None]) -> None:
        self._observed.add(str(labels))
        self.readers.append((labels, read))

    def keep(self, labels: dict[str, Any], value: float) -> None:
        if str(labels) not in self._observed:  # else it was read at a step's end, and collecting reads it anew
            self._last[str(labels)] = labels, value

    def collect(self, _: CallbackOptions) -> Iterator[Observation]:
        for entry in tuple(self.readers):
            labels, read = entry
            try:
                value = read()
            except Exception as error:
                self._report(self._name, f"the callback of the gauge {self._name} raised {type(error).__name__}")
                continue
            if value is not None:
                yield metrics.Observation(value, labels)
            elif entry in self.readers:
                self.readers.remove(entry)
        for labels, value in tuple(self._last.values()):
            yield metrics.Observation(value, labels)


def _kept(labels: Iterable[str], attributes: Attributes) -> dict[str, Any]:
    return {label: attributes[label] for label in labels if label in attributes}


def _histogram(meter: Meter, instrument: Instrument) -> metrics.Histogram:
    return meter.create_histogram(
        instrument.name,
        instrument.unit,
        instrument.description,
        explicit_bucket_boundaries_advisory=names.boundaries(instrument),
    )
