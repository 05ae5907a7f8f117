"""What telemetry cannot hold is converted, without raising and without waiting for a device."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from vgen.profiling import Instrument, ProfilingContext
from vgen.profiling.sinks.memory import MemorySink

COUNTER = Instrument("test.counter", "counter")
GAUGE = Instrument("test.gauge", "gauge")
HISTOGRAM = Instrument("test.histogram", "histogram")


class Tensor:
    """Like a tensor on a device: to print it, or to make it a number, is to wait for the device."""

    device = "cuda:0"

    def __str__(self) -> str:
        raise AssertionError("the device was waited for")

    __repr__ = __float__ = __str__  # type: ignore[assignment]


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no")

    @property
    def device(self) -> str:
        raise RuntimeError("no")


class Colour(str, Enum):  # noqa: UP042 - whose `str` is not its value
    RED = "red"


class Odd:
    def __str__(self) -> str:
        return "odd"


VALUES: list[tuple[object, object]] = [
    (True, True),
    (2**80, 2**80),
    (np.float32(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (Colour.RED, "red"),
    (Path("/a/b"), "/a/b"),
    (Tensor(), "<Tensor>"),
    (Broken(), "<Broken>"),
    (Odd(), "odd"),
    ([1, 2], [1, 2]),
    (("a", None), ["a", None]),
    ([Tensor(), 1, np.float64(2)], ["<Tensor>", 1, 2.0]),
    ([[1], [2]], ["[1]", "[2]"]),
    ({"a": [1]}, '{"a": [1]}'),
    ({"a": Tensor()}, "<dict>"),
    ({1, 2}, "<set>"),
    (b"prompt", "<bytes>"),
]


@pytest.mark.parametrize(("value", "recorded"), VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.fault(
    point="values and callbacks in telemetry",
    did="Attributes are of odd types",
    happens="They are recorded as something simple",
    within=20,
)
def test_odd_attributes_are_recorded_as_something_simple(profiling: ProfilingContext, value: object, recorded: object):
    with profiling.span("x", a=value) as span:
        span.set(b=value).event("e", c=value).link(span, d=value)
        profiling.record(COUNTER, 1, e=value)
    circular: list[object] = []
    circular.append(circular)
    with profiling.span("x", a=circular):
        pass
    assert span.attributes == {"a": recorded, "b": recorded}
    assert type(span.attributes["a"]) is type(recorded)
    assert (span.events[0].attributes, span.links[0].attributes) == ({"c": recorded}, {"d": recorded})


def test_an_unknown_type_is_reported_once(profiling: ProfilingContext, caplog: pytest.LogCaptureFixture):
    class Unknown:
        pass

    class Other:
        pass

    for _ in range(5):
        with profiling.span("x", first=Unknown()):
            profiling.record(COUNTER, 1, second=Unknown())
    with profiling.span("x", other=Other()):
        pass
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    assert "Unknown" in told[0]
    assert "'first'" in told[0]
    assert "Other" in told[1]


def test_none_is_left_out_and_keys_become_strings(profiling: ProfilingContext):
    with profiling.span("x", {1: "a", "b": None, Colour.RED: 2, Tensor(): 3}) as span:  # type: ignore[dict-item]
        pass
    assert span.attributes == {"1": "a", "red": 2, "<Tensor>": 3}


def test_what_is_no_number_is_measured_as_nan(profiling: ProfilingContext, memory: MemorySink):
    profiling.record_many(HISTOGRAM, [1, 2.5, True, np.float32(0.5), 10**400, -(10**400), Tensor(), "?", None])  # type: ignore[list-item]
    assert [repr(value) for value in memory.measurements[0].values] == [
        "1", "2.5", "1", "0.5", "inf", "-inf", "nan", "nan", "nan",
    ]  # fmt: skip
    profiling.record(COUNTER, Tensor())  # type: ignore[arg-type]
    profiling.record(GAUGE, np.float64(3))
    summary = profiling.summary()
    assert (summary["test.histogram.count"], summary["test.histogram.nonfinite"]) == (4, 5)
    assert (summary["test.counter.nonfinite"], summary["test.gauge"]) == (1, 3.0)
    assert type(summary["test.gauge"]) is float
