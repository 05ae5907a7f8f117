"""What was said stays private, unless one switch says otherwise; then cut and redacted."""

from __future__ import annotations

import json

import pytest

from vgen import ProfilingContext
from vgen.generation import Generation
from vgen.profiling import names
from vgen.profiling.content import ContentCapture, public_url
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.testing import FakeEngine, MemorySink

SECRET = [61, 62, 63, 64]


class Words:
    """A tokenizer whose text is easy to look for."""

    def __call__(self, text):
        return {"input_ids": SECRET}

    def decode(self, ids):
        return "secret words " * len(ids)


def recorded(tmp_path, capture):
    sink = MemorySink()
    with ProfilingContext([sink, JsonlSink(tmp_path)], capture=capture) as profiling:
        generation = Generation(FakeEngine(), source=[], tokenizer=Words(), profiling=profiling)
        generation.generate(["a secret"])
        with pytest.raises(ValueError, match="secret"), profiling.span("reward"):
            raise ValueError("the secret words were wrong")
    (file,) = tmp_path.glob("*.jsonl")
    return sink, file.read_text()


def test_by_default_nothing_that_was_said_is_recorded(tmp_path):
    sink, text = recorded(tmp_path, None)
    assert "secret" not in text
    assert json.dumps(SECRET, separators=(",", ":")) not in text
    assert sink.named("reward")[0].error == "ValueError"
    for span in sink.spans:
        assert not {names.INPUT_CONTENT, names.OUTPUT_CONTENT, names.EXCEPTION_MESSAGE} & span.attributes.keys()


def test_the_switch_records_it_redacted_and_cut(tmp_path):
    capture = ContentCapture(max_length=10, redact=lambda text: text.replace("secret", "***"))
    sink, text = recorded(tmp_path, capture)
    (request,) = sink.named(names.REQUEST)
    assert request.attributes[names.INPUT_CONTENT] == "*** words …"
    assert request.attributes[names.OUTPUT_CONTENT] == "*** words …"
    assert sink.named("reward")[0].attributes[names.EXCEPTION_MESSAGE] == "the *** wo…"
    assert "secret" not in text


def test_a_redaction_that_fails_withholds_and_goes_no_further(tmp_path):
    sink, text = recorded(tmp_path, ContentCapture(redact=lambda text: text.undefined))
    assert "secret" not in text
    assert sink.named(names.REQUEST)[0].attributes[names.INPUT_CONTENT] == "<withheld: redaction raised AttributeError>"


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
