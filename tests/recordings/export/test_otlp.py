"""OTLP JSON, parsed by OpenTelemetry's own protobuf messages."""

from __future__ import annotations

import base64

import pytest

from vgen.profiling import semconv


def test_otlp_is_what_opentelemetrys_own_messages_parse(exported, spans):
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    from google.protobuf import json_format

    whole = exported("otlp")
    # OTLP's JSON has ids in hexadecimal where protobuf's own has base64
    for resource in whole["resourceSpans"]:
        for span in resource["scopeSpans"][0]["spans"]:
            for owner in (span, *span["links"]):
                for key in ("traceId", "spanId", "parentSpanId"):
                    if key in owner:
                        owner[key] = base64.b64encode(bytes.fromhex(owner[key])).decode()
    request = json_format.ParseDict(whole, messages.ExportTraceServiceRequest())
    found = [span for resource in request.resource_spans for span in resource.scope_spans[0].spans]
    assert len(found) == len(spans)
    for span in found:
        record = spans[span.span_id.hex()]
        assert span.name == record.name
        assert span.start_time_unix_nano == record.start_ns
        assert span.parent_span_id.hex() == (record.parent_id or "")
        assert (span.status.code == 2) == (record.error is not None)
        assert {one.key for one in span.attributes} >= record.attributes.keys()
    ranks = [
        one.value.int_value
        for resource in request.resource_spans
        for one in resource.resource.attributes
        if one.key == semconv.RANK
    ]
    assert sorted(ranks) == [0, 1]
