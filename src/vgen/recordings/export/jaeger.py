"""A trace in the JSON of Jaeger's query service. Jaeger's page opens such a file without a backend ("Upload").

The format: `internal/uimodel/model.go` of github.com/jaegertracing/jaeger.
"""

from __future__ import annotations

import json
from typing import Any

from ..reader.run import SpanRecord, by_process, grouped
from ..reader.selection import Selection


def export(chosen: Selection) -> str:
    """The traces as Jaeger's query service would return them. Times are microseconds."""
    data = [_trace(spans, chosen.end_ns) for spans in grouped(chosen.spans, lambda span: span.trace_id)]
    return json.dumps({"data": data, "total": len(data), "limit": 0, "offset": 0, "errors": None})


def _trace(spans: list[SpanRecord], end_ns: int) -> dict[str, Any]:
    processes = [group[0].process for group in by_process(spans)]
    numbers = {process.key: f"p{number}" for number, process in enumerate(processes, 1)}
    described = {
        numbers[process.key]: {"serviceName": "vgen", "tags": [_tag(*item) for item in process.attributes.items()]}
        for process in processes
    }
    known = {span.span_id for span in spans}
    made = [_span(span, numbers[span.process.key], known, end_ns) for span in spans]
    return {"traceID": spans[0].trace_id, "spans": made, "processes": described, "warnings": None}


def _span(span: SpanRecord, process: str, known: set[str], end_ns: int) -> dict[str, Any]:
    tags = [_tag(key, value) for key, value in span.attributes.items()]
    tags.append(_tag("span.kind", "internal"))
    if span.error is not None:
        tags += [_tag("error", True), _tag("otel.status_code", "ERROR"), _tag("otel.status_description", span.error)]
    references = [_reference("FOLLOWS_FROM", link["trace_id"], link["span_id"]) for link in span.links]
    if span.parent_id is not None:
        references.insert(0, _reference("CHILD_OF", span.trace_id, span.parent_id))
    warnings = ["the span never ended: drawn to the last moment recorded"] if span.end_ns is None else []
    if span.parent_id is not None and span.parent_id not in known:
        warnings.append("its parent is not in this file")
    return {
        "traceID": span.trace_id,
        "spanID": span.span_id,
        "flags": 1,
        "operationName": span.name,
        "references": references,
        "startTime": span.start_ns // 1000,
        "duration": (span.end(end_ns) - span.start_ns) // 1000,
        "tags": tags,
        "logs": [_log(event) for event in span.events],
        "processID": process,
        "warnings": warnings or None,
    }


def _log(event: dict[str, Any]) -> dict[str, Any]:
    fields = {"event": event["name"], **event["attributes"]}
    return {"timestamp": event["unix_ns"] // 1000, "fields": [_tag(key, value) for key, value in fields.items()]}


def _reference(kind: str, trace_id: str, span_id: str) -> dict[str, str]:
    return {"refType": kind, "traceID": trace_id, "spanID": span_id}


def _tag(key: str, value: Any) -> dict[str, Any]:
    for kind, name in ((bool, "bool"), (int, "int64"), (float, "float64"), (str, "string")):
        if isinstance(value, kind):
            return {"key": key, "type": name, "value": value}
    return {"key": key, "type": "string", "value": json.dumps(value)}
