"""Jaeger's own JSON: its page takes such a file without any backend ("Upload" beside the search)."""

from __future__ import annotations

import json
from typing import Any

from ..analysis.run import Process, SpanRecord
from ..analysis.select import Selection
from ..profiling import names


def export(chosen: Selection) -> str:
    """The traces as Jaeger's query service would answer them. Times are microseconds."""
    traces: dict[str, list[SpanRecord]] = {}
    for span in chosen.spans:
        traces.setdefault(span.trace_id, []).append(span)
    data = [_trace(trace_id, spans, chosen.end_ns) for trace_id, spans in traces.items()]
    return json.dumps({"data": data, "total": len(data), "limit": 0, "offset": 0, "errors": None})


def _trace(trace_id: str, spans: list[SpanRecord], end_ns: int) -> dict[str, Any]:
    processes: dict[str, str] = {}
    described: dict[str, Any] = {}
    for span in spans:
        key = "" if span.process is None else span.process.key
        if key not in processes:
            processes[key] = f"p{len(processes) + 1}"
            described[processes[key]] = _process(span.process)
    known = {span.span_id for span in spans}
    found = [_span(span, processes["" if span.process is None else span.process.key], known, end_ns) for span in spans]
    return {"traceID": trace_id, "spans": found, "processes": described, "warnings": None}


def _process(process: Process | None) -> dict[str, Any]:
    tags: dict[str, Any] = {}
    if process is not None:
        tags = {names.HOST_NAME: process.host, names.PROCESS_ID: process.pid, names.RANK: process.rank}
    return {"serviceName": "vgen", "tags": [_tag(key, value) for key, value in tags.items() if value is not None]}


def _span(span: SpanRecord, process: str, known: set[str], end_ns: int) -> dict[str, Any]:
    end = max(end_ns if span.end_ns is None else span.end_ns, span.start_ns)
    tags = [_tag(key, value) for key, value in span.attributes.items()]
    tags.append(_tag("span.kind", "internal"))
    if span.error is not None:
        tags += [_tag("error", True), _tag("otel.status_code", "ERROR"), _tag("otel.status_description", span.error)]
    references = [
        _reference("FOLLOWS_FROM", str(link.get("trace_id")), str(link.get("span_id"))) for link in span.links
    ]
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
        "duration": (end - span.start_ns) // 1000,
        "tags": tags,
        "logs": [_log(event, span) for event in span.events if isinstance(event.get("unix_ns"), int)],
        "processID": process,
        "warnings": warnings or None,
    }


def _log(event: dict[str, Any], span: SpanRecord) -> dict[str, Any]:
    shift = 0 if span.process is None else span.process.shift_ns
    fields = {"event": event.get("name"), **(event.get("attributes") or {})}
    return {"timestamp": (event["unix_ns"] + shift) // 1000, "fields": [_tag(key, fields[key]) for key in fields]}


def _reference(kind: str, trace_id: str, span_id: str) -> dict[str, str]:
    return {"refType": kind, "traceID": trace_id, "spanID": span_id}


def _tag(key: str, value: Any) -> dict[str, Any]:
    for kind, name in ((bool, "bool"), (int, "int64"), (float, "float64"), (str, "string")):
        if isinstance(value, kind):
            return {"key": key, "type": name, "value": value}
    return {"key": key, "type": "string", "value": json.dumps(value)}
