"""Measurements as OpenTelemetry metrics: the part of `OTelSink` that has to do with instruments."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from opentelemetry import metrics

from .. import semconv
from ..measurement import Attributes, Instrument, Measurement

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

logger = logging.getLogger("vgen.telemetry")

MAX_USER_SPANS = 64
"""How many of the caller's own span names get a duration histogram. A name with a number in it has no bound."""

_VALID_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\-/]{0,254}")
_sink_numbers = itertools.count()

Timer: TypeAlias = Callable[[float, Attributes, "str | None", "Context"], None]
"""Takes a span's seconds, attributes and error, and the context in which it was current (for exemplars)."""
_Recorder: TypeAlias = Callable[[Sequence[float], Attributes], None]


class OTelInstruments:
    """Makes the OpenTelemetry instrument of each `Instrument`, once, with buckets that suit its unit.

    Only attributes in `Instrument.attributes` become labels. Values that OpenTelemetry cannot hold (NaN, infinities,
    negative values in a histogram or counter) are left out, counted in `refused`, and reported once for each
    instrument.
    """

    def __init__(
        self, provider: MeterProvider | None, scope: str, version: str, conventions: Iterable[semconv.Convention]
    ) -> None:
        self.refused = 0
        self._provider = provider
        self._meter = metrics.get_meter(scope, version, provider)
        # OpenTelemetry keeps only the first callback for a gauge name in a scope, so each sink has its own scope.
        number = next(_sink_numbers)
        self._gauge_meter = metrics.get_meter(
            scope, version, provider, attributes={semconv.SINK_NUMBER: number} if number else None
        )
        self._aliases: list[semconv.Alias] = []
        for alias in itertools.chain.from_iterable(convention.metrics for convention in conventions):
            if alias not in self._aliases:  # two conventions may share a name, which must get each value once
                self._aliases.append(alias)
        self._recorders: dict[tuple[str, object], _Recorder] = {}
        self._user_spans = 0
        self._gauges: dict[str, _Gauge] = {}
        self._reported: set[str] = set()

    def record(self, measurement: Measurement) -> None:
        """Record the values, also under the names of the conventions."""
        instrument, attributes = measurement.instrument, measurement.attributes
        key = instrument.name, attributes.get(semconv.ENGINE)
        record = self._recorders.get(key)
        if record is None:
            record = self._recorders[key] = self._recorder(instrument, key[1])
        record(measurement.values, attributes)

    @property
    def idle(self) -> bool:
        """Whether nobody receives metrics: no provider was passed, and none is global so far."""
        provider = self._provider or metrics.get_meter_provider()
        return type(provider).__module__.startswith("opentelemetry.metrics.")

    def timer(self, span_name: str) -> Timer | None:
        """Return what records the seconds of spans of that name; None if they get no histogram."""
        instrument, spec = semconv.duration(span_name), semconv.SPANS.get(span_name)
        if spec is not None and spec.selected:
            return None
        if spec is None and not span_name.startswith(semconv.RESERVED):
            self._user_spans += 1
            if self._user_spans > MAX_USER_SPANS or not _VALID_NAME.fullmatch(instrument.name):
                return None
        record = _histogram(self._meter, instrument).record
        names = tuple(label for label in instrument.attributes if label != semconv.ERROR_TYPE)

        def time(seconds: float, attributes: Attributes, error: str | None, context: Context) -> None:
            labels = _labels(names, attributes) if names else {}
            if error is not None:
                labels[semconv.ERROR_TYPE] = error
            record(seconds, labels, context)

        return time

    def observe(self, instrument: Instrument, read: Callable[[], float | None], attributes: Attributes) -> None:
        """Call `read` whenever metrics are collected, on whatever thread collects them."""
        self._gauge(instrument).observe(_labels(instrument.attributes, attributes), read)

    def close(self) -> None:
        """Call no callback any more: the observed objects may be gone while the provider still collects."""
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

    def _recorder(self, instrument: Instrument, engine: object) -> _Recorder:
        recorders = [self._recorder_of_one(instrument, {})]
        recorders += [
            self._recorder_of_one(alias.instrument, alias.constant)
            for alias in self._aliases
            if alias.of == instrument.name and engine in alias.engines
        ]

        def record(values: Sequence[float], attributes: Attributes) -> None:
            valid = self._valid(instrument, values)
            if valid:
                for record_one in recorders:
                    record_one(valid, attributes)

        return record

    def _recorder_of_one(self, instrument: Instrument, constant: Mapping[str, str]) -> _Recorder:
        names = tuple(label for label in instrument.attributes if label not in constant)
        if instrument.kind == "gauge":
            set_last = self._gauge(instrument).set_last
            return lambda values, attributes: set_last(_labels(names, attributes), values[-1])
        if instrument.kind == "counter":
            add = self._meter.create_counter(instrument.name, instrument.unit, instrument.description).add
            return lambda values, attributes: add(sum(values), {**constant, **_labels(names, attributes)})
        record = _histogram(self._meter, instrument).record

        def record_each(values: Sequence[float], attributes: Attributes) -> None:
            labels = {**constant, **_labels(names, attributes)}
            for value in values:
                record(value, labels)

        return record_each

    def _valid(self, instrument: Instrument, values: Sequence[float]) -> Sequence[float]:
        least = -math.inf if instrument.kind == "gauge" else 0
        valid = [value for value in values if least <= value < math.inf and value > -math.inf]
        if len(valid) < len(values):
            self.refused += len(values) - len(valid)
            self._report(instrument.name, f"{instrument.name} got values that are negative or not finite")
            return valid
        return values

    def _report(self, name: str, problem: str) -> None:
        if name not in self._reported:
            self._reported.add(name)
            logger.warning("vgen: values are missing in OpenTelemetry's metrics: %s", problem)


class _Gauge:
    """The callbacks of a gauge, and for labels without a callback the last value that was recorded.

    OpenTelemetry's synchronous gauge does not do: until version 1.45 of its SDK, it is gone after one collection.
    """

    def __init__(self, instrument: Instrument, report: Callable[[str, str], None]) -> None:
        self.readers: list[tuple[dict[str, Any], Callable[[], float | None]]] = []
        self._name, self._report = instrument.name, report
        self._last: dict[str, tuple[dict[str, Any], float]] = {}
        self._observed: set[str] = set()

    def observe(self, labels: dict[str, Any], read: Callable[[], float | None]) -> None:
        self._observed.add(str(labels))
        self.readers.append((labels, read))

    def set_last(self, labels: dict[str, Any], value: float) -> None:
        if str(labels) not in self._observed:  # else the value came from a callback, which collecting calls again
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


def _labels(names: Iterable[str], attributes: Attributes) -> dict[str, Any]:
    return {name: attributes[name] for name in names if name in attributes}


def _histogram(meter: Meter, instrument: Instrument) -> metrics.Histogram:
    return meter.create_histogram(
        instrument.name,
        instrument.unit,
        instrument.description,
        explicit_bucket_boundaries_advisory=semconv.boundaries(instrument),
    )
