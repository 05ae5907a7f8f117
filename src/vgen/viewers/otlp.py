"""OTLP JSON, as OpenTelemetry's file exporter writes it: one line, one `ExportTraceServiceRequest`.

A collector's `otlpjsonfile` receiver reads it, and `POST /v1/traces` takes it with `Content-Type: application/json`.
Ids are hexadecimal and 64-bit integers strings, as OTLP's JSON has them.
"""

from __future__ import annotations

import json
from typing import Any

from ..analysis.run import Process, SpanRecord
from ..analysis.select import Selection
from ..profiling import names

_INTERNAL, _UNSET, _ERROR = 1, 0, 2


def export(chosen: Selection) -> str:
    """The spans, one resource for each process. One that never ended has the end of what was recorded."""
    by_process: dict[str, list[SpanRecord]] = {}
    for span in chosen.spans:
        by_process.setdefault("" if span.process is None else span.process.key, []).append(span)
    resources = [
        {
            "resource": {"attributes": _resource(spans[0].process)},
            "scopeSpans": [
                {
                    "scope": {"name": "vgen", "version": spans[0].process.vgen if spans[0].process else ""},
                    "spans": [_span(span, chosen.end_ns) for span in spans],
                }
            ],
        }
        for spans in by_process.values()
    ]
    return json.dumps({"resourceSpans": resources})


def _resource(process: Process | None) -> list[dict[str, Any]]:
    own: dict[str, Any] = {"service.name": "vgen"}
    if process is not None:
        own |= {names.HOST_NAME: process.host, names.PROCESS_ID: process.pid, names.RANK: process.rank}
    return _attributes(own)


def _span(span: SpanRecord, end_ns: int) -> dict[str, Any]:
    end = max(end_ns if span.end_ns is None else span.end_ns, span.start_ns)
    shift = 0 if span.process is None else span.process.shift_ns
    unended = {"unended": True} if span.end_ns is None else {}
    found: dict[str, Any] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "name": span.name,
        "kind": _INTERNAL,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(end),
        "attributes": _attributes({**span.attributes, **unended}),
        "events": [
            {
                "timeUnixNano": str(event["unix_ns"] + shift),
                "name": str(event.get("name")),
                "attributes": _attributes(event.get("attributes") or {}),
            }
            for event in span.events
            if isinstance(event.get("unix_ns"), int)
        ],
        "links": [
            {
                "traceId": str(link.get("trace_id")),
                "spanId": str(link.get("span_id")),
                "attributes": _attributes(link.get("attributes") or {}),
            }
            for link in span.links
        ],
        "status": {"code": _UNSET} if span.error is None else {"code": _ERROR, "message": span.error},
    }
    if span.parent_id is not None:
        found["parentSpanId"] = span.parent_id
    return found


def _attributes(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items() if value is not None]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)} if -(1 << 63) <= value < 1 << 63 else {"stringValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(item) for item in value]}}
    return {"stringValue": value if isinstance(value, str) else json.dumps(value)}
