"""What was said stays private, unless one switch says otherwise; then cut and redacted."""

from __future__ import annotations

import json

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vgen import Instrument, ProfilingContext, PromptError, Sink
from vgen.generation import Generation
from vgen.profiling import semconv
from vgen.profiling.content_capture import ContentCapture, public_url
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.profiling.sinks.otel import OTelSink
from vgen.testing import FakeEngine, MemorySink

SECRET = [61, 62, 63, 64]


class Words:
    """A tokenizer whose text is easy to look for."""

    def __call__(self, text):
        return {"input_ids": SECRET}

    def decode(self, ids):
        return "secret words " * len(ids)


class Talkative(Sink):
    """Repeats in its errors what it was to hand on, as backends' clients do."""

    inline = True

    def on_end(self, span):
        raise ValueError(f"cannot send secret {span.attributes}")

    def close(self, timeout):
        raise ValueError("cannot send a secret")


def recorded(tmp_path, capture):
    """All that came out: the memory sink, and as text the file, OpenTelemetry's spans and its metrics."""
    sink, exporter, reader = MemorySink(), InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    otel = OTelSink(provider, MeterProvider([reader], shutdown_on_exit=False))
    with ProfilingContext([sink, JsonlSink(tmp_path), otel, Talkative()], capture=capture) as profiling:
        generation = Generation(FakeEngine(), source=[], processing_class=Words(), profiling=profiling)
        for _ in range(3):
            generation.generate(["a secret"])
        with pytest.raises(PromptError) as refused:
            generation.generate(["a secret", SECRET * 100])
        assert str(refused.value) == "prompt 1 has 400 tokens; at most 63 leave room for a completion"
        profiling.observe(Instrument("x", "gauge"), lambda: [][len("a secret")])
        with pytest.raises(ValueError, match="secret"), profiling.step(1), profiling.span("reward"):
            raise ValueError("the secret words were wrong")
    (file,) = tmp_path.glob("*.jsonl")
    metrics = reader.get_metrics_data()
    assert metrics is not None
    return sink, file.read_text() + "".join(s.to_json() for s in exporter.get_finished_spans()) + metrics.to_json()


def test_by_default_nothing_that_was_said_is_recorded(tmp_path, caplog):
    sink, text = recorded(tmp_path, None)
    assert "vgen.generate.duration" in text
    assert "secret" not in text + caplog.text
    assert "Talkative" in caplog.text
    for spelled in (json.dumps(SECRET, separators=(",", ":")), json.dumps(SECRET), str(SECRET)[1:-1]):
        assert spelled not in text + caplog.text
    assert sink.named("reward")[0].error == "ValueError"
    for span in sink.spans:
        assert not {semconv.INPUT_CONTENT, semconv.OUTPUT_CONTENT, semconv.EXCEPTION_MESSAGE} & span.attributes.keys()


def test_the_switch_records_it_redacted_and_cut(tmp_path):
    capture = ContentCapture(max_length=10, redact=lambda text: text.replace("secret", "***"))
    sink, text = recorded(tmp_path, capture)
    request = sink.named(semconv.REQUEST)[0]
    assert request.attributes[semconv.INPUT_CONTENT] == "*** words …"
    assert request.attributes[semconv.OUTPUT_CONTENT] == "*** words …"
    assert sink.named("reward")[0].attributes[semconv.EXCEPTION_MESSAGE] == "the *** wo…"
    assert "secret" not in text


@pytest.mark.fault(
    point="values and callbacks in telemetry",
    did="The user's redaction raises",
    happens="The text is withheld",
    within=20,
)
def test_a_redaction_that_fails_withholds_and_goes_no_further(tmp_path):
    sink, text = recorded(tmp_path, ContentCapture(redact=lambda text: text.undefined))
    assert "secret" not in text
    assert (
        sink.named(semconv.REQUEST)[0].attributes[semconv.INPUT_CONTENT]
        == "<withheld: redaction raised AttributeError>"
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:key@host:8000/v1?token=abc#x", "http://host:8000/v1"),
        ("https://host", "https://host"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses_are_shown_without_their_credentials(url, shown):
    assert public_url(url) == shown
