"""A span's identity in other processes: carriers and pickles."""

from __future__ import annotations

import pickle
import time

import pytest

from vgen.profiling import Instrument, ProfilingContext
from vgen.profiling.sinks.memory import MemorySink

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MALFORMED = [
    "",
    "x",
    f"00-{TRACE}-{SPAN}",
    f"00-{TRACE}-{SPAN}-01-more",
    f"00-{TRACE}-{SPAN}-01 ",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{TRACE[:-1]}-{SPAN}-01",
    17,
    b"00",
]
COUNTER = Instrument("test.counter", "counter")


def test_the_carrier_is_the_open_span_as_traceparent(profiling: ProfilingContext):
    assert profiling.carrier() == {}
    with profiling.span("x") as span:
        assert profiling.carrier() == {"traceparent": f"00-{span.trace_id}-{span.span_id}-01"}
        span.sampled = False
        assert profiling.carrier()["traceparent"].endswith("-00")


@pytest.mark.parametrize("header", [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-03", f"cc-{TRACE}-{SPAN}-01-more"])
def test_roots_lie_beneath_a_remote_parent(memory: MemorySink, header: str):
    profiling = ProfilingContext([memory], {"vgen.rank": 2}, parent={"traceparent": header})
    assert profiling.carrier() == {"traceparent": f"00-{TRACE}-{SPAN}-01"}, "the parent goes on to whoever comes next"
    with profiling.step(1) as step, profiling.span("x") as span:
        pass
    assert (step.trace_id, step.parent_id, step.parent, step.sampled) == (TRACE, SPAN, None, True)
    assert (span.trace_id, span.parent_id) == (TRACE, step.span_id)
    now = time.monotonic_ns()
    profiling.rebuilt("y", now, now)
    assert memory.spans[-1].parent_id == SPAN
    assert profiling.bind(a=1).carrier()["traceparent"].endswith("-01")


def test_the_sampled_flag_travels():
    profiling = ProfilingContext(parent={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    with profiling.span("x") as span:
        assert not span.sampled
        assert profiling.carrier()["traceparent"].endswith("-00")


@pytest.mark.parametrize("header", MALFORMED, ids=str)
@pytest.mark.fault(
    point="values and callbacks in telemetry",
    did="A received `traceparent` is malformed",
    happens="It is passed over with one warning",
    within=20,
)
def test_a_malformed_carrier_is_passed_over_with_one_warning(caplog: pytest.LogCaptureFixture, header: object):
    profiling = ProfilingContext(parent={"traceparent": header})  # type: ignore[dict-item]
    for _ in range(2):
        with profiling.span("x") as span:
            pass
    assert span.parent_id is None
    assert len(caplog.records) == 1
    assert "traceparent" in caplog.text


@pytest.mark.parametrize("parent", [None, {}, {"tracestate": "a=b"}])
def test_without_a_traceparent_nothing_is_said(caplog: pytest.LogCaptureFixture, parent: dict[str, str] | None):
    with ProfilingContext(parent=parent).span("x") as span:
        assert span.parent_id is None
    assert not caplog.records


def test_a_carrier_of_no_mapping_is_passed_over(caplog: pytest.LogCaptureFixture):
    with ProfilingContext(parent=f"00-{TRACE}-{SPAN}-01").span("x") as span:  # type: ignore[arg-type]
        assert span.parent_id is None
    assert len(caplog.records) == 1


def test_a_pickled_context_arrives_without_sinks_beneath_the_open_span(profiling: ProfilingContext, memory: MemorySink):
    bound = profiling.bind(vgen_rank=3)
    with bound.span("outer") as outer:
        one, other = pickle.loads(pickle.dumps((bound, bound.bind(b=1))))
    with one.span("remote") as remote, other.span("inner") as inner:
        one.record(COUNTER, 2)
    assert (remote.trace_id, remote.parent_id, remote.parent) == (outer.trace_id, outer.span_id, None)
    assert remote.attributes == {"vgen_rank": 3}
    assert (inner.parent, inner.attributes) == (remote, {"vgen_rank": 3, "b": 1}), "copies stay copies of each other"
    assert one.summary()["test.counter"] == 2
    assert memory.spans == [outer]
    assert "test.counter" not in profiling.summary()
    assert pickle.loads(pickle.dumps(profiling)).carrier() == {}
