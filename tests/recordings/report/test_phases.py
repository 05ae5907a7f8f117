"""Where the time of a step went: every moment once."""

from __future__ import annotations

import pytest
from helpers.handmade import BEGIN, Writer, ns, usual_run
from hypothesis import given
from hypothesis import strategies as st

from vgen.profiling import semconv
from vgen.recordings.reader.recording import Recording
from vgen.recordings.report.phases import ENGINE, split, step_times


@given(
    st.lists(
        st.tuples(st.integers(-5, 25), st.integers(0, 20), st.sampled_from([*ENGINE, "reward", "update"])), max_size=12
    )
)
def test_phases_add_up_to_the_whole_and_the_engine_goes_first(parts):
    stretches = [(start, start + length, name) for start, length, name in parts]
    found = split(0, 20, stretches, "rest")
    # the plain way, moment by moment
    plain: dict[str, float] = {}
    for moment in range(20):
        there = {name for start, end, name in stretches if start <= moment < end}
        engine = [name for name in ENGINE if name in there]
        if engine or not there:
            what = engine[-1] if engine else "rest"
            plain[what] = plain.get(what, 0) + 1e-9
    assert sum(found.values()) == pytest.approx(20e-9)
    for name in (*ENGINE, "rest"):
        assert found.get(name, 0) == pytest.approx(plain.get(name, 0))


def test_steps_of_a_run_and_what_lies_between_them(tmp_path):
    steps = step_times(Recording(usual_run(tmp_path)))
    assert [step.number for step in steps] == [1, 2, 3, 4]
    first, second = steps[:2]
    assert first.phases == pytest.approx(
        {"generate": 1.0, "sleep": 0.1, "update": 1.0, "wake": 0.1, "sync": 0.3, "rest": 0.1}
    )
    assert second.phases["generate"] == pytest.approx(8.0)
    assert second.trainer_seconds == pytest.approx(1.1)
    assert first.after == pytest.approx({"idle": 1.0})
    assert steps[-1].after == {}


def test_what_the_engine_does_within_a_generate_counts_as_what_it_is(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10)
    outer = writer.span(semconv.GENERATE, 1, 9, under=step)
    writer.span(semconv.WEIGHT_SYNC, 1, 3, under=outer)
    writer.span("inner", 4, 5, under=outer)
    (found,) = step_times(Recording(tmp_path))
    assert found.phases == pytest.approx({"generate": 6.0, "sync": 2.0, "rest": 2.0})


def test_between_steps_the_engine_may_work(tmp_path):
    writer = Writer(tmp_path)
    writer.step(1, 0, 1)
    writer.span(semconv.GENERATE, 2, 5, under=None)
    writer.step(2, 6, 7)
    first, _ = step_times(Recording(tmp_path))
    assert first.after == pytest.approx({"idle": 2.0, "generate": 3.0})


def test_a_step_that_never_ended_goes_to_the_last_record(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(7, 0, None)
    writer.span(semconv.GENERATE, 1, 4, under=step)
    (found,) = step_times(Recording(tmp_path))
    assert found.open
    assert found.end == BEGIN + ns(4)
    assert found.phases == pytest.approx({"generate": 3.0, "rest": 1.0})


def test_work_of_another_process_beneath_the_step_is_the_steps(tmp_path):
    trainer, worker = Writer(tmp_path, pid=1, rank=None), Writer(tmp_path, pid=2, rank=None)
    step = trainer.step(3, 0, 10)
    # its context came as a carrier: the trace, but none of the attributes
    bare = {**step, "attributes": {}}
    worker.span(semconv.GENERATE, 2, 6, under=bare)
    (found,) = step_times(Recording(tmp_path))
    assert found.phases == pytest.approx({"generate": 4.0, "rest": 6.0})


def test_the_step_number_is_found_wherever_it_stands_among_the_attributes(tmp_path):
    writer = Writer(tmp_path)
    step = writer.span(semconv.STEP, 0, 4, run="a", vgen__step=9)
    writer.span(semconv.GENERATE, 1, 2, under=step)
    (found,) = step_times(Recording(tmp_path))
    assert (found.number, found.phases["generate"]) == (9, pytest.approx(1.0))


def test_a_span_without_a_step_number_is_of_the_step_during_which_it_started(tmp_path):
    trainer, worker = Writer(tmp_path, pid=1, rank=None), Writer(tmp_path, pid=2, rank=None)
    first = trainer.step(3, 0, 10)
    second = trainer.step(4, 10, 20, trace=first["trace_id"])
    unknown = {"trace_id": first["trace_id"], "span_id": "ee" * 8, "attributes": {}}  # a parent that was not recorded
    for start, end in ((2, 5), (10, 11), (20, 22)):
        worker.span(semconv.GENERATE, start, end, under=unknown)
    found = step_times(Recording(tmp_path))
    assert second["trace_id"] == first["trace_id"]
    assert [(step.number, step.phases.get("generate")) for step in found] == [
        (3, pytest.approx(3.0)),
        (4, pytest.approx(1.0)),
    ]
