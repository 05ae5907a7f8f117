"""A clock that is set back during a run does not reorder its steps."""

from __future__ import annotations

import pytest
from helpers.handmade import Writer, usual_step

from vgen.cli import main
from vgen.recordings.report.figures import summarize


@pytest.mark.parametrize("seconds", [3600.0, 30.0])
@pytest.mark.fault(
    point="clocks of a recorded run",
    did="The clock is set back by an hour",
    happens="The steps stay in order, and no idle hour appears",
    within=20,
)
def test_a_clock_that_is_set_back_leaves_the_steps_in_order_and_makes_no_idle_time(tmp_path, capsys, seconds):
    writer, at = Writer(tmp_path), 0.0
    for number in range(1, 7):
        if number == 4:
            writer.ahead = -seconds
        at = usual_step(writer, number, at, longest=2.0 if number == 5 else 1.0) + 0.5
    found = summarize(tmp_path)
    assert [one.step for one in found.steps] == [1, 2, 3, 4, 5, 6]
    idle = [one.after.get("idle", 0.0) for one in found.steps]
    assert idle == pytest.approx([0.5, 0.5, 0.0, 0.5, 0.5, 0.0])
    assert [one.seconds for one in found.steps] == pytest.approx([2.6, 2.6, 2.6, 2.6, 3.6, 2.6])
    assert found.total.seconds == pytest.approx(16.6 + 4 * 0.5)
    assert found.steps[4].concurrency is not None
    assert found.steps[4].concurrency.seconds == pytest.approx(2.0)
    assert all(sum(one.phases.values()) == pytest.approx(one.seconds) for one in found.steps)
    (said,) = found.problems
    assert said.startswith(f"the clock of rank 0 was set back by {seconds - 0.5:,.3f} s or more")
    assert main(["report", str(tmp_path)]) == 0
    assert "was set back" in capsys.readouterr().err


def test_a_clock_is_set_back_twice_and_within_a_step(tmp_path):
    writer = Writer(tmp_path)
    writer.step(1, 0, 2)
    writer.ahead = -600.0
    writer.step(3, 4, 9)  # of another thread: it began and ended while step 2 was open
    writer.ahead = 0.0
    writer.step(2, 3, 12)
    writer.ahead = -600.0
    writer.step(4, 13, 14)
    writer.ahead = -1200.0
    writer.step(5, 15, 16)
    writer.step(6, 17, None)
    found = summarize(tmp_path)
    assert [one.step for one in found.steps] == [1, 3, 2, 4, 5, 6]
    assert sum(one.after.get("idle", 0.0) for one in found.steps) < 10
    assert found.total.seconds < 30


def test_steps_that_overlap_are_no_wrong_clock(tmp_path):
    writer = Writer(tmp_path)
    writer.step(2, 5, 9.5)
    writer.step(1, 0, 9)
    writer.step(3, 9, 30)
    found = summarize(tmp_path)
    assert found.problems == []
    assert [one.step for one in found.steps] == [1, 2, 3]
