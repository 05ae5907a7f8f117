"""Jaeger's JSON: the fields that Jaeger's page reads, and times on one clock."""

from __future__ import annotations

from helpers.handmade import BEGIN, ns

from vgen.profiling import semconv

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


def test_jaeger_has_the_fields_that_jaeger_has(exported, spans):
    whole = exported("jaeger")
    assert whole.keys() == {"data", "total", "limit", "offset", "errors"}
    assert sum(len(trace["spans"]) for trace in whole["data"]) == len(spans)
    for trace in whole["data"]:
        has("trace", trace)
        tagged = [process["tags"] for process in trace["processes"].values()]
        for process in trace["processes"].values():
            has("process", process)
        for span in trace["spans"]:
            has("span", span)
            assert span["traceID"] == trace["traceID"]
            assert span["processID"] in trace["processes"]
            record = spans[span["spanID"]]
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


def test_clocks_are_aligned_in_exports_too(exported):
    data = exported("jaeger")["data"]
    starts = [span["startTime"] for trace in data for span in trace["spans"] if span["operationName"] == semconv.STEP]
    assert starts == [BEGIN // 1000, BEGIN // 1000]
    logs = [log["timestamp"] for trace in data for span in trace["spans"] for log in span["logs"]]
    assert logs == [(BEGIN + ns(8)) // 1000] * 2
