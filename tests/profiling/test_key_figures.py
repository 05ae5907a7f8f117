"""The few numbers for a trainer's log."""

from __future__ import annotations

import pytest

from vgen import Generation, Instrument, ProfilingContext, Sampling
from vgen.profiling.key_figures import key_figures
from vgen.testing import FakeEngine


def summary_of_a_step(work) -> dict[str, float]:
    profiling = ProfilingContext([])
    generation = Generation(FakeEngine(), [], profiling=profiling)
    with profiling.step(1) as step:
        work(generation, profiling)
    return step.summary()


def whole(generation, profiling):
    generation.generate([[1, 2, 3]] * 4, Sampling(max_tokens=4), 2)
    generation.sleep(1)
    generation.wake_up()
    generation.sync_weights()
    with profiling.span("reward"):
        pass


def test_a_whole_step_has_at_most_thirty_besides_the_callers_own():
    summary = summary_of_a_step(whole)
    figures = key_figures(summary)
    assert figures.pop("reward.duration.sum") == summary["reward.duration.sum"]
    assert len(figures) <= 30
    assert figures["vgen.generate.duration.sum"] == summary["vgen.generate.duration.sum"]
    assert figures["vgen.request.e2e.p99"] == summary["vgen.request.e2e.p99"]
    assert figures["vgen.completion.length.mean"] == pytest.approx(3.0)
    assert all(isinstance(value, int | float) for value in figures.values())


def test_what_did_not_happen_is_zero_and_what_has_no_value_is_absent():
    figures = key_figures(summary_of_a_step(lambda *_: None))
    assert figures["vgen.generate.duration.sum"] == figures["vgen.stall.duration.sum"] == 0
    assert figures["vgen.generate.output_tokens"] == 0
    assert "vgen.request.e2e.p99" not in figures
    assert figures["train.step.duration.sum"] > 0


def test_the_callers_own_names_may_begin_like_the_steps():
    profiling = ProfilingContext([])
    with profiling.step(1) as step:
        with profiling.span("train.step_optimizer"):
            pass
        profiling.record(Instrument("train.steps_skipped", "counter"), 3)
    figures = key_figures(step.summary())
    assert figures["train.steps_skipped"] == 3
    assert figures["train.step_optimizer.duration.sum"] > 0
    assert "train.step.duration.count" not in figures
