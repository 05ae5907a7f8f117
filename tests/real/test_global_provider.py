"""vLLM's spans in the trainer's process: they are children of vgen's spans if the caller's provider is global."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

from vgen import ColocateGeneration, ProfilingContext, Sampling
from vgen.profiling.sinks.otel import OTelSink
from vgen.testing import tiny_model

model, tokenizer = tiny_model(sys.argv[1])
nowhere = {"otlp_traces_endpoint": "http://127.0.0.1:9/v1/traces"}  # where vLLM's own provider would send them
with ProfilingContext([OTelSink()]) as profiling, ColocateGeneration(
    model, processing_class=tokenizer, max_model_length=128, profiling=profiling, engine_kwargs=nowhere
) as generation:
    generation.sync_weights()  # its verification samples too
    exporter.clear()
    with profiling.step(1):
        generation.generate(["once upon", "a time"], Sampling(max_tokens=8))
    assert trace.get_tracer_provider() is provider
    assert "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" not in os.environ, "vLLM leaves its own there"
spans = [span for span in exporter.get_finished_spans() if span.name != "vgen.engine.close"]
by_id = {span.context.span_id: span for span in spans}
rows = [
    (span.attributes["gen_ai.request.id"], parent.name, parent.attributes["gen_ai.request.id"])
    for span in spans
    if span.name == "llm_request" and (parent := by_id[span.parent.span_id])
]
print(json.dumps([rows, len({span.context.trace_id for span in spans})]))
"""


@pytest.mark.slow
def test_vllms_spans_are_children_of_vgens_if_the_callers_provider_is_global(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    env["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows, traces = json.loads(done.stdout.splitlines()[-1])
    assert traces == 1
    assert len({request for request, _, _ in rows}) == len(rows) == 2
    assert all(parent == "vgen.request" and request == its for request, parent, its in rows), rows
