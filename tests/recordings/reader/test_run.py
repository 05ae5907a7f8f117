"""A small run in memory."""

from __future__ import annotations

from helpers.handmade import Writer, ns, usual_run
from helpers.recorded_run import read_run

from vgen.profiling import semconv
from vgen.recordings.reader.processes import Process
from vgen.recordings.reader.run import SpanRecord, as_span, children, thin, tree


def span(name: str, parent: str | None, start: int, end: int | None, **more) -> SpanRecord:
    return SpanRecord(name, "t", name, parent, start, end, {}, **more)


def test_traces_steps_and_rows(tmp_path):
    usual_run(tmp_path, steps=2)
    (file,) = tmp_path.glob("*.jsonl")
    with file.open("a") as content:
        content.write('{"type":"step","number":2,"trace_id":"a","span_id":"b","summary":{"x":1.5}}\n')
    run = read_run(tmp_path)
    assert [trace[0].attributes[semconv.STEP_NUMBER] for trace in run.traces()] == [1, 2]
    assert run.step(2) == run.traces()[1]
    assert run.step(3) == []
    assert run.rows == [(2, {"x": 1.5})]
    assert {measurement["name"] for measurement in run.measurements} >= {semconv.REQUEST_E2E.name}


def test_an_end_replaces_the_start_of_the_same_span(tmp_path):
    writer = Writer(tmp_path)
    writer.span("x", 0, 1, span_id="ab" * 8, a=2)
    writer.span("x", 0, None, span_id="ab" * 8, a=1)
    writer.span("y", 2, None)
    first, second = read_run(tmp_path).spans
    assert (first.attributes["a"], first.end_ns) == (2, first.start_ns + ns(1))
    assert second.end_ns is None
    assert second.end(5) == second.start_ns  # never before its start


def test_events_and_links_of_a_wrong_form_are_left_out():
    record = {"name": "x", "trace_id": "t", "span_id": "s", "start_unix_ns": 1, "end_unix_ns": 2, "attributes": {}}
    record["events"] = [7, {"name": "no time"}, {"name": 3, "unix_ns": 5, "attributes": [1]}]
    record["links"] = "none"
    found = as_span(record, Process("p"))
    assert found.events == [{"name": "3", "unix_ns": 5, "attributes": {}}]
    assert found.links == []
    found.shift(10)
    assert (found.start_ns, found.end_ns, found.events[0]["unix_ns"]) == (11, 12, 15)


def test_a_tree_is_depth_first_with_the_position_of_each_parent():
    spans = [span("b", "a", 2, 3), span("a", None, 0, 9), span("c", "a", 1, 2), span("d", "b", 2, 3)]
    spans.append(span("e", "gone", 5, 6))
    assert [(one.name, depth, parent) for one, depth, parent in tree(spans)] == (
        [("a", 0, -1), ("c", 1, 0), ("b", 1, 0), ("d", 2, 2), ("e", 0, -1)]
    )
    assert [one.name for one in children(spans)[None]] == ["a", "e"]


def test_thinning_keeps_open_failed_and_long_spans():
    made = [span("short", None, 0, 1), span("long", None, 0, 9), span("open", None, 0, None)]
    spans = {one.name: one for one in [*made, span("failed", None, 0, 1, error="E")]}
    assert thin(spans, 4) == 0
    assert thin(spans, 3) == 1
    assert spans.keys() == {"long", "failed", "open"}
    assert thin(spans, 2) == 1
    assert spans.keys() == {"failed", "open"}
