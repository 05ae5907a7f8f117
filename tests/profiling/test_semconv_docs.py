"""The page of all names is up to date and complete, and a run with other names is found out."""

from __future__ import annotations

from pathlib import Path

from helpers.telemetry_names import CONVENTIONS, KNOWN

from vgen.profiling import Instrument, ProfilingContext, semconv, semconv_docs
from vgen.testing import MemorySink

ROOT = Path(__file__).parents[2]


def test_the_reference_page_is_what_semconv_py_says():
    page = (ROOT / "docs" / "telemetry.md").read_text()
    assert page == semconv_docs.page(), "run: python -m vgen.profiling.semconv_docs > docs/telemetry.md"


def test_the_reference_page_has_every_name():
    page = semconv_docs.page()
    for name in KNOWN:
        assert f"`{name}`" in page


def test_a_run_with_names_of_vgens_that_are_not_listed_is_found_out():
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    stray = Instrument("vgen.stray.metric", "counter")
    with profiling.span("reward", mine=1), profiling.span("vgen.stray", {"gen_ai.stray": 1}) as span:
        span.event("vgen.stray.event")
        profiling.record(stray, 1)
    found = " ".join(semconv_docs.unknown(sink.spans, sink.measurements))
    for name in ("span vgen.stray ", "event vgen.stray.event", "metric vgen.stray.metric", "attribute gen_ai.stray"):
        assert name in found
    assert "reward" not in found
    assert "mine" not in found


def test_a_run_that_was_read_back_is_checked_alike(tmp_path: Path):
    from helpers.recorded_run import read_run

    from vgen.profiling.sinks.jsonl import JsonlSink

    with ProfilingContext([JsonlSink(tmp_path)]) as profiling, profiling.step(1):
        profiling.record(semconv.GENERATED_TOKENS, 1)
        with profiling.span("vgen.stray") as span:
            span.event("vgen.stray.event")
    run = read_run(tmp_path)
    assert semconv_docs.unknown(run.spans, run.measurements) == [
        "span vgen.stray is not in semconv.py",
        "event vgen.stray.event is not in semconv.py",
    ]


def test_no_two_metrics_have_the_same_name_in_prometheus():
    instruments = {m.name: m for m in (*semconv.METRICS.values(), *map(semconv.duration, semconv.SPANS))}
    instruments |= {alias.instrument.name: alias.instrument for c in CONVENTIONS for alias in c.metrics}
    spelled = {name: semconv_docs.prometheus_name(instrument) for name, instrument in instruments.items()}
    assert len(set(spelled.values())) == len(spelled)
