"""Clocks that are apart are brought together by what must have been so, and only these."""

from __future__ import annotations

import pytest
from helpers.handmade import Writer, usual_run, usual_step

from vgen.profiling import semconv
from vgen.recordings.reader.selection import select
from vgen.recordings.report.figures import summarize


def test_a_span_beneath_another_hosts_lies_within_it(tmp_path):
    trainer = Writer(tmp_path, host="one", rank=0)
    worker = Writer(tmp_path, host="two", rank=None, ahead=180.0)
    step = trainer.step(1, 0, 10)
    worker.span(semconv.GENERATE, 2, 6, under={**step, "attributes": {}})
    found = summarize(tmp_path)
    (said,) = [one for one in found.problems if "clock" in one]
    # anywhere within the step would do: the middle, give or take the room that is left
    assert "(two) is 179.000 s ahead of that of" in said
    assert "1 span with a parent in the other process" in said
    assert "to within 3.000 s" in said
    (told,) = found.steps
    assert told.phases["generate"] == pytest.approx(4.0)
    spans = {span.name: span for span in select(tmp_path, 1).spans}
    outer, inner = spans[semconv.STEP], spans[semconv.GENERATE]
    assert outer.start_ns <= inner.start_ns <= (inner.end_ns or 0) <= (outer.end_ns or 0)
    assert (inner.end_ns or 0) - inner.start_ns == 4 * 10**9


def test_several_spans_pin_the_clock_down(tmp_path):
    trainer = Writer(tmp_path, host="one", rank=0)
    worker = Writer(tmp_path, host="two", rank=None, ahead=-60.0)
    for number in range(3):
        step = trainer.step(number, 10 * number, 10 * number + 5)
        bare = {**step, "attributes": {}}
        worker.span(semconv.GENERATE, 10 * number + 0.01, 10 * number + 1, under=bare)
        worker.span(semconv.WEIGHT_SYNC, 10 * number + 4, 10 * number + 4.99, under=bare)
    found = summarize(tmp_path)
    shift = {one.host: one.clock_shift_seconds for one in found.processes}
    assert shift == {"one": 0.0, "two": pytest.approx(60.0, abs=0.011)}
    assert any("(two) is 60.000 s behind" in one for one in found.problems)


@pytest.mark.fault(
    point="clocks of a recorded run",
    did="Ranks' clocks differ",
    happens="They are aligned by the steps that they share",
    within=20,
)
def test_ranks_are_aligned_by_the_steps_they_share(tmp_path):
    for rank, ahead in ((0, 0.0), (1, 300.0), (2, 0.0)):
        writer = Writer(tmp_path, host=f"host{rank}", pid=rank, rank=rank, ahead=ahead)
        at = 0.0
        for number in range(3):
            at = usual_step(writer, number, at, update=1.0 + 0.1 * rank)
    found = summarize(tmp_path)
    assert [one.clock_shift_seconds for one in found.processes] == [0.0, pytest.approx(-300.0, abs=0.5), 0.0]
    (said,) = [one for one in found.problems if "clock" in one]
    assert "the clock of rank 1 (host1) is" in said
    assert "aligned by the starts of 3 common steps" in said
    assert [(one.step, len(one.ranks)) for one in found.steps] == [(0, 2), (1, 2), (2, 2)]


def test_clocks_that_agree_are_left_alone(tmp_path):
    for rank in (0, 1):
        usual_step(Writer(tmp_path, host=f"host{rank}", rank=rank, ahead=0.004 * rank), 1, 0.0)
    found = summarize(tmp_path)
    assert [one.clock_shift_seconds for one in found.processes] == [0.0, 0.0]
    assert found.problems == []


def test_a_run_started_again_on_another_host_is_no_wrong_clock(tmp_path):
    usual_run(tmp_path, steps=2, slow=None)
    again, at = Writer(tmp_path, host="two", ahead=5000.0), 0.0
    for number in (1, 2):
        at = usual_step(again, number, at)
    found = summarize(tmp_path)
    assert [one.clock_shift_seconds for one in found.processes] == [0.0, 0.0]
    assert [one.step for one in found.steps] == [1, 2, 1, 2]
    assert any("recorded more than once" in one and "1, 2" in one for one in found.problems)
    # what is shown of a step is its last time
    shown = select(tmp_path, 2)
    assert {span.process.host for span in shown.spans if span.process is not None} == {"two"}
    assert any("more than once" in problem for problem in shown.problems)
