"""`MemorySink` keeps what it receives, up to its limit."""

from __future__ import annotations

from vgen.profiling import Instrument, ProfilingContext
from vgen.testing import MemorySink

LENGTH = Instrument("test.length", "histogram", "{token}", "A length.")


def test_it_keeps_spans_in_the_order_of_their_ends_measurements_and_summaries():
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    with profiling.step(7):
        with profiling.span("outer") as outer, profiling.span("inner"):
            assert outer.span_id in sink.open
        profiling.record(LENGTH, 3)
    assert [span.name for span in sink.spans][:2] == ["inner", "outer"]
    assert sink.named("outer") == [outer]
    assert sink.open == {}
    assert [measurement.instrument for measurement in sink.measurements] == [LENGTH]
    ((number, summary),) = sink.rows
    assert (number, summary["test.length.count"]) == (7, 1)
    sink.clear()
    assert (sink.spans, sink.measurements, sink.rows) == ([], [], [])


def test_a_full_list_drops_its_oldest_records():
    sink = MemorySink(limit=3)
    profiling = ProfilingContext([sink])
    for number in range(10):
        with profiling.span(f"span {number}"):
            pass
    assert [span.name for span in sink.spans][-1] == "span 9"
    assert len(sink.spans) <= 3
