"""Exports, read back by what their formats say: Chrome's trace events, Jaeger's JSON, OTLP."""

from __future__ import annotations

import base64
import json

import pytest
from handmade import BEGIN, Writer, ns, usual_run
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.analysis.run import SpanRecord
from vgen.analysis.select import select
from vgen.cli import main
from vgen.profiling import names
from vgen.viewers.chrome import lanes


@pytest.fixture
def run(tmp_path):
    """Two ranks on two hosts, one clock ahead, with an error, an event, links, a span that never ended."""
    folder = tmp_path / "run"
    for rank in (0, 1):
        writer = Writer(folder, host=f"host{rank}", pid=7, rank=rank, ahead=500.0 * rank)
        step = writer.step(4, 0, 10)
        writer.generate(step, 0, 4, [(0, 3), (0, 4), (0.5, 2)], spans=3)
        record = writer.span("update", 4, 8, under=step, error="ValueError", ratio=0.5, tags=["a", "b"], large=1 << 70)
        record |= {
            "events": [{"name": "exception", "unix_ns": writer.at(8), "attributes": {"exception.type": "ValueError"}}]
        }
        record |= {
            "links": [{"trace_id": "ab" * 16, "span_id": "cd" * 8, "attributes": {}}],
            "span_id": f"{rank + 1:x}" * 16,
        }
        writer.line(record)
        writer.span(names.WEIGHT_SYNC, 9, None, under=step)
    return folder


def exported(run, tmp_path, form: str):
    file = tmp_path / f"out.{form}"
    assert main(["trace", str(run), "--step", "4", f"--{form}", str(file)]) == 0
    return json.loads(file.read_text())


def spans_of(run) -> dict[str, SpanRecord]:
    return {span.span_id: span for span in select(run, 4).spans}


def test_chrome_reloaded(run, tmp_path):
    whole = exported(run, tmp_path, "chrome")
    events = whole["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    known = spans_of(run)
    assert len(slices) == len(known) == 2 * 9
    begin = min(span.start_ns for span in known.values())
    for event in slices:
        span = known[event["args"]["span_id"]]
        assert event["name"] == span.name
        assert event["ts"] == pytest.approx((span.start_ns - begin) / 1e3)
        if span.end_ns is not None:
            assert event["dur"] == pytest.approx((span.end_ns - span.start_ns) / 1e3)
        else:
            assert event["args"]["unended"] is True
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"rank 0 on host0", "rank 1 on host1"}
    assert len({event["pid"] for event in events}) == 2
    assert [event["name"] for event in events if event["ph"] == "i"] == ["exception"] * 2
    # Perfetto's rule: on a track, slices lie within each other or apart
    for track in {(event["pid"], event["tid"]) for event in slices}:
        stack: list[float] = []
        for event in sorted(
            (one for one in slices if (one["pid"], one["tid"]) == track), key=lambda one: (one["ts"], -one["dur"])
        ):
            while stack and stack[-1] <= event["ts"] + 1e-6:
                stack.pop()
            assert not stack or event["ts"] + event["dur"] <= stack[-1] + 1e-6, event
            stack.append(event["ts"] + event["dur"])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(-1, 5)), max_size=25))
def test_slices_of_a_track_never_cross(parts):
    spans: list[SpanRecord] = []
    for index, (start, length, parent) in enumerate(sorted(parts)):
        above = f"{parent}" if 0 <= parent < index else None
        spans.append(SpanRecord("x", "t", f"{index}", above, start, start + length, {}))
    tracks: dict[int, list[SpanRecord]] = {}
    for span, lane in zip(spans, lanes(spans, 100), strict=True):
        tracks.setdefault(lane, []).append(span)
    for track in tracks.values():
        for index, first in enumerate(track):
            for second in track[index + 1 :]:
                assert second.start_ns >= (first.end_ns or 0) or (second.end_ns or 0) <= (first.end_ns or 0)


# The fields and their JSON types, from `internal/uimodel/model.go` of github.com/jaegertracing/jaeger and
# `types/trace.tsx` of jaegertracing/jaeger-ui: what its page reads. A field with a None may be null.
JAEGER = {
    "trace": {"traceID": str, "spans": list, "processes": dict, "warnings": (list, type(None))},
    "span": {
        "traceID": str,
        "spanID": str,
        "flags": int,
        "operationName": str,
        "references": list,
        "startTime": int,
        "duration": int,
        "tags": list,
        "logs": list,
        "processID": str,
        "warnings": (list, type(None)),
    },
    "reference": {"refType": str, "traceID": str, "spanID": str},
    "process": {"serviceName": str, "tags": list},
    "log": {"timestamp": int, "fields": list},
    "tag": {"key": str, "type": str, "value": object},
}
TYPES = {"string": str, "bool": bool, "int64": int, "float64": float}


def has(kind: str, found: dict) -> None:
    assert found.keys() == JAEGER[kind].keys()
    for key, types in JAEGER[kind].items():
        assert isinstance(found[key], types), (kind, key, found[key])


def test_jaeger_has_the_fields_that_jaeger_has(run, tmp_path):
    whole = exported(run, tmp_path, "jaeger")
    assert whole.keys() == {"data", "total", "limit", "offset", "errors"}
    known = spans_of(run)
    assert sum(len(trace["spans"]) for trace in whole["data"]) == len(known)
    for trace in whole["data"]:
        has("trace", trace)
        tagged = [process["tags"] for process in trace["processes"].values()]
        for process in trace["processes"].values():
            has("process", process)
        for span in trace["spans"]:
            has("span", span)
            assert span["traceID"] == trace["traceID"]
            assert span["processID"] in trace["processes"]
            record = known[span["spanID"]]
            assert span["startTime"] == record.start_ns // 1000
            parents = [one["spanID"] for one in span["references"] if one["refType"] == "CHILD_OF"]
            assert parents == ([record.parent_id] if record.parent_id else [])
            for reference in span["references"]:
                has("reference", reference)
            for log in span["logs"]:
                has("log", log)
                tagged.append(log["fields"])
            tagged.append(span["tags"])
            errors = [tag["value"] for tag in span["tags"] if tag["key"] == "error"]
            assert errors == ([True] if record.error else [])
            assert any("never ended" in warning for warning in span["warnings"] or ()) == (record.end_ns is None)
        for tags in tagged:
            for tag in tags:
                has("tag", tag)
                assert type(tag["value"]) is TYPES[tag["type"]]


def test_otlp_is_what_opentelemetrys_own_messages_parse(run, tmp_path):
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    from google.protobuf import json_format

    whole = exported(run, tmp_path, "otlp")
    # OTLP's JSON has ids in hexadecimal where protobuf's own has base64
    for resource in whole["resourceSpans"]:
        for span in resource["scopeSpans"][0]["spans"]:
            for owner in (span, *span["links"]):
                for key in ("traceId", "spanId", "parentSpanId"):
                    if key in owner:
                        owner[key] = base64.b64encode(bytes.fromhex(owner[key])).decode()
    request = json_format.ParseDict(whole, messages.ExportTraceServiceRequest())
    known = spans_of(run)
    found = [span for resource in request.resource_spans for span in resource.scope_spans[0].spans]
    assert len(found) == len(known)
    for span in found:
        record = known[span.span_id.hex()]
        assert span.name == record.name
        assert span.start_time_unix_nano == record.start_ns
        assert span.parent_span_id.hex() == (record.parent_id or "")
        assert (span.status.code == 2) == (record.error is not None)
        assert {one.key for one in span.attributes} >= record.attributes.keys()
    ranks = [
        one.value.int_value
        for resource in request.resource_spans
        for one in resource.resource.attributes
        if one.key == names.RANK
    ]
    assert sorted(ranks) == [0, 1]


def test_clocks_are_aligned_in_exports_too(run, tmp_path):
    data = exported(run, tmp_path, "jaeger")["data"]
    starts = [span["startTime"] for trace in data for span in trace["spans"] if span["operationName"] == names.STEP]
    assert starts == [BEGIN // 1000, BEGIN // 1000]
    logs = [log["timestamp"] for trace in data for span in trace["spans"] for log in span["logs"]]
    assert logs == [(BEGIN + ns(8)) // 1000] * 2


def test_ten_thousand_requests_at_once_take_seconds_not_minutes(tmp_path):
    spans = [SpanRecord("x", "t", f"{index}", "p", 0, 100 + index, {}) for index in range(10_000)]
    assert len(set(lanes(spans, 0))) == 10_000
    one_by_one = [SpanRecord("x", "t", f"{index}", None, index, index + 1, {}) for index in range(10_000)]
    assert set(lanes(one_by_one, 0)) == {0}


def test_several_files_from_one_reading(tmp_path):
    usual_run(tmp_path / "run")
    files = {form: tmp_path / form for form in ("html", "chrome", "jaeger", "otlp", "svg")}
    arguments = [part for form, file in files.items() for part in (f"--{form}", str(file))]
    assert main(["trace", str(tmp_path / "run"), *arguments]) == 0
    assert all(file.stat().st_size > 1000 for file in files.values())
