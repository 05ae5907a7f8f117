"""Device time is read later and never waited for; what cannot be read is absent."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import psutil
import pytest

from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.device_timing import DeviceTimer, memory
from vgen.testing import MemorySink

DEVICE = {semconv.DEVICE_FREE, semconv.DEVICE_USED, semconv.ALLOCATED, semconv.RESERVED_MEMORY}


class Event:
    """A CUDA event whose moment the test decides."""

    now, passed = 0.0, True

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return Event.passed

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3

    def synchronize(self) -> None:
        raise AssertionError("nothing may wait for the device")


@pytest.fixture
def cuda(monkeypatch):
    stand_in = SimpleNamespace(
        is_initialized=lambda: True,
        Event=Event,
        mem_get_info=lambda: (60, 100),
        memory_stats_as_nested_dict=lambda: {
            "allocated_bytes": {"all": {"current": 10}, "small_pool": {"current": 1}},
            "reserved_bytes": {"all": {"current": 20}, "small_pool": {"current": 2}},
        },
        synchronize=lambda: pytest.fail("nothing may wait for the device"),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=stand_in))
    Event.now, Event.passed = 0.0, True


def test_device_seconds_go_to_their_span_and_step_once_the_device_is_done(cuda):
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    timer = DeviceTimer(profiling)
    Event.passed = False
    with profiling.step(1) as row:
        with profiling.span("update") as span, timer.of(span):
            Event.now += 0.25
        assert timer.resolve() == 1.0
        Event.passed = True
    (found,) = [m for m in sink.measurements if m.instrument is semconv.DEVICE_TIME]
    assert found.values == (0.25,)
    assert found.attributes[semconv.TIMED_SPAN] == "update"
    assert found.attributes[semconv.TIMED_SPAN_ID] == span.span_id
    assert row.summary()["vgen.device.time.sum"] == 0.25
    assert row.summary()["vgen.device.pending"] == 0.0


def test_the_span_ends_when_the_host_is_done_whatever_the_device_does(cuda):
    Event.passed = False
    profiling = ProfilingContext()
    timer = DeviceTimer(profiling)
    with profiling.span("x") as span, timer.of(span):
        pass
    assert span.end_ns is not None
    assert timer.resolve() == 1.0


def test_an_exception_still_records_the_end(cuda):
    profiling = ProfilingContext()
    timer = DeviceTimer(profiling)
    with contextlib.suppress(OSError), profiling.span("x") as span, timer.of(span):
        Event.now += 1
        raise OSError
    assert profiling.summary()["vgen.device.time.sum"] == 1.0


def test_memory_of_device_and_host(cuda):
    found = memory()
    assert found[semconv.DEVICE_FREE] == 60
    assert found[semconv.DEVICE_USED] == 40
    assert found[semconv.ALLOCATED] == 10
    assert found[semconv.RESERVED_MEMORY] == 20
    assert found[semconv.HOST_RESIDENT] > 1 << 20


def test_without_a_device_it_is_absent_not_zero(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    timer = DeviceTimer(profiling)
    with profiling.step(1) as row, profiling.span("x") as span, timer.of(span):
        pass
    assert not [m for m in sink.measurements if m.instrument is semconv.DEVICE_TIME]
    assert "vgen.device.time.count" not in row.summary()
    assert not DEVICE & memory().keys()
    assert memory()[semconv.HOST_AVAILABLE] > 0


def test_off_does_nothing(cuda):
    timer = DeviceTimer(ProfilingContext.disabled())
    with ProfilingContext.disabled().span("x") as span, timer.of(span):
        pass
    assert timer.resolve() == 0.0


def test_the_hosts_memory_is_in_bytes():
    found, here = memory(), psutil.Process().memory_info()
    assert found[semconv.HOST_RESIDENT] == pytest.approx(here.rss, rel=0.2)
    assert found[semconv.HOST_AVAILABLE] == pytest.approx(psutil.virtual_memory().available, rel=0.2)
