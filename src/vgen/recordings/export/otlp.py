"""A trace as OTLP JSON, as OpenTelemetry's file exporter writes it: one line, one `ExportTraceServiceRequest`.

A collector's `otlpjsonfile` receiver reads it, and `POST /v1/traces` accepts it with `Content-Type: application/json`.
IDs are hexadecimal, and 64-bit integers are strings, as OTLP's JSON encoding requires
(https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding).
"""

from __future__ import annotations

import json
from typing import Any

from ..reader.run import SpanRecord, by_process
from ..reader.selection import Selection

_INTERNAL, _UNSET, _ERROR = 1, 0, 2
"""Of OTLP's enumerations: a kind of span, and two status codes."""


def export(chosen: Selection) -> str:
    """The spans, one resource for each process. A span that never ended gets the last recorded time as its end."""
    resources = [
        {
            "resource": {"attributes": _attributes({"service.name": "vgen", **spans[0].process.attributes})},
            "scopeSpans": [
                {
                    "scope": {"name": "vgen", "version": spans[0].process.vgen},
                    "spans": [_span(span, chosen.end_ns) for span in spans],
                }
            ],
        }
        for spans in by_process(chosen.spans)
    ]
    return json.dumps({"resourceSpans": resources})


def _span(span: SpanRecord, end_ns: int) -> dict[str, Any]:
    unended = {"unended": True} if span.end_ns is None else {}
    parent = {"parentSpanId": span.parent_id} if span.parent_id is not None else {}
    return {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "name": span.name,
        "kind": _INTERNAL,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end(end_ns)),
        "attributes": _attributes({**span.attributes, **unended}),
        "events": [
            {"timeUnixNano": str(e["unix_ns"]), "name": e["name"], "attributes": _attributes(e["attributes"])}
            for e in span.events
        ],
        "links": [
            {"traceId": link["trace_id"], "spanId": link["span_id"], "attributes": _attributes(link["attributes"])}
            for link in span.links
        ],
        "status": {"code": _UNSET} if span.error is None else {"code": _ERROR, "message": span.error},
        **parent,
    }


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
        return {"arrayValue": {"values": [_value(item) for item in value]}}  # pyright: ignore[reportUnknownVariableType]
    return {"stringValue": value if isinstance(value, str) else json.dumps(value)}
