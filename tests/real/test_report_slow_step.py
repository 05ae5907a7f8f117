"""`vgen report --step 2` says why step 2 of a run on the real engine was slow."""

from __future__ import annotations

import json

import pytest

from vgen import Sampling
from vgen.cli import main
from vgen.profiling import semconv
from vgen.profiling.sinks.jsonl import JsonlSink

pytestmark = pytest.mark.slow

PROMPTS = ("once upon a time", "the quick brown fox", "to be or not to be", "it was a dark night")


@pytest.fixture
def recorded(real, tmp_path):
    """A recorded run of four steps. In step 2 a few sequences grow long: they are the tail."""
    some = tuple(range(40, 60))
    sampling = Sampling(temperature=1.0, max_tokens=16, stop_token_ids=some, seed=3)
    long = Sampling(temperature=1.0, max_tokens=450, stop_token_ids=some[:4], seed=3)
    real.generation.generate(PROMPTS, sampling, 8)  # warm up the engine
    real.sink.clear()
    for number in (1, 2, 3, 4):
        with real.profiling.step(number):
            real.generation.generate(PROMPTS, long if number == 2 else sampling, 8)
            real.generation.sleep(level=2)
            with real.profiling.span("update"):
                pass
            real.generation.wake_up(["weights"])
            real.generation.sync_weights()
            real.generation.wake_up(["kv_cache"])
    # The spans of the real engine, written by the real sink.
    sink = JsonlSink(tmp_path / "run")
    for span in real.sink.spans:
        sink.on_end(span)
    for measurement in real.sink.measurements:
        sink.on_measurement(measurement)
    sink.close(10.0)
    return tmp_path / "run"


def test_one_command_says_why_step_2_was_slow(recorded, real, capsys):
    assert main(["report", str(recorded), "--step", "2"]) == 0
    said = capsys.readouterr()
    why = said.out.split("step 2\n")[1].split("where the time went")[0]
    assert "times the median of the other steps" in why, said.out
    assert "generate took" in why
    assert "its longest completion has" in why
    assert "of sequences took" in said.out or "sequences took" in said.out
    assert main(["report", str(recorded), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    slow = max(found["steps"], key=lambda step: step["seconds"])
    assert slow["step"] == 2
    # Every request has a timing, and the figures are the engine's.
    assert [step["tail"]["sequences"] for step in found["steps"]] == [32] * 4
    recorded_tokens = [span.attributes[semconv.OUTPUT_TOKENS] for span in real.sink.named(semconv.GENERATE)]
    assert [step["output_tokens"] for step in found["steps"]] == recorded_tokens
    assert slow["concurrency"]["peak"] == 32
    assert slow["tail"]["mean"] < 32
    for step in found["steps"]:
        generated = step["phases"]["generate"]
        (call,) = [
            span for span in real.sink.named(semconv.GENERATE) if span.attributes[semconv.STEP_NUMBER] == step["step"]
        ]
        assert generated == pytest.approx(call.duration)
        assert sum(step["phases"].values()) == pytest.approx(step["seconds"])
        # No request began before its call or ended after it.
        assert step["tail"]["generation_seconds"] == pytest.approx(generated, rel=0.02, abs=0.005)
    for sync in found["syncs"]:
        assert sum(sync["phases"].values()) == pytest.approx(sync["seconds"], rel=0.02)


def test_the_tail_has_the_sequences_that_ended_last(recorded, real):
    from vgen.recordings.report.figures import summarize

    slow = summarize(recorded).steps[1]
    (engine,) = [span for span in real.sink.named(semconv.ENGINE_GENERATE) if span.attributes[semconv.STEP_NUMBER] == 2]
    values = {
        measured.instrument.name: measured.values
        for measured in real.sink.measurements
        if measured.attributes.get(semconv.STEP_NUMBER) == 2
    }
    starts, seconds = values[semconv.REQUEST_START.name], values[semconv.REQUEST_E2E.name]
    ends = sorted(start + took for start, took in zip(starts, seconds, strict=True))
    assert min(starts) >= 0
    assert ends[-1] <= engine.duration
    tail = slow.tail
    alone = ends[-1] - ends[-tail.last - 1]
    assert tail.seconds == pytest.approx(alone, abs=0.02 * engine.duration + 0.005)
