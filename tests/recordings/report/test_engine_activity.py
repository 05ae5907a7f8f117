"""Weight syncs by phase, and cycles of sleep and wake-up."""

from __future__ import annotations

import pytest
from helpers.handmade import Writer, usual_run, words

from vgen.cli import main
from vgen.profiling import semconv
from vgen.recordings.report.figures import summarize


def test_syncs_by_phase_with_the_rest_and_the_pause(tmp_path):
    usual_run(tmp_path / "in process", steps=1)
    (sync,) = summarize(tmp_path / "in process").syncs
    assert sync.phases == pytest.approx({"transfer": 0.1, "load": 0.15, "rest": 0.05})
    assert sync.gigabytes_per_second == pytest.approx(1.0)
    assert sync.gather_seconds == pytest.approx(0.05)
    writer = Writer(tmp_path / "server")
    step = writer.step(1, 0, 10)
    sync = writer.span(semconv.WEIGHT_SYNC, 0, 6, under=step, vgen__engine="server")
    for name, start, end in (
        ("transfer", 0, 1),
        ("pause", 1, 2),
        ("load", 2, 4),
        ("reset_cache", 4, 5),
        ("resume", 5, 6),
    ):
        writer.span(f"{semconv.WEIGHT_SYNC}.{name}", start, end, under=sync)
    (sync,) = summarize(tmp_path / "server").syncs
    assert sync.paused_seconds == pytest.approx(5.0)
    assert sync.phases["rest"] == pytest.approx(0.0)


def test_memory_cycle_by_cycle(tmp_path, capsys):
    usual_run(tmp_path)
    found = summarize(tmp_path).memory
    assert [cycle.step for cycle in found] == [1, 2, 3, 4]
    assert {cycle.freed_bytes for cycle in found} == {cycle.taken_bytes for cycle in found} == {1000}
    assert found[0].asleep_seconds == pytest.approx(1.0)
    assert main(["report", str(tmp_path)]) == 0
    assert "the host memory of rank 0 grew by 3 B over 4 cycles" in words(capsys.readouterr().out)


def test_a_wake_up_without_a_sleep_is_no_cycle_and_parts_of_one_add_up(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10)
    taken = "vgen__memory__device__bytes"
    writer.span(semconv.WAKE_UP, 0, 1, under=step, **{taken: 7})
    writer.span(semconv.SLEEP, 1, 2, under=step, **{taken: 100})
    writer.span(semconv.WAKE_UP, 4, 5, under=step, **{taken: 60})
    writer.span(semconv.WAKE_UP, 6, 8, under=step, **{taken: 40})
    (cycle,) = summarize(tmp_path).memory
    assert (cycle.freed_bytes, cycle.taken_bytes, cycle.asleep_seconds) == (100, 100, pytest.approx(2.0))
    assert cycle.wake_seconds == pytest.approx(3.0)


def test_work_outside_of_steps_is_counted_and_open_spans_are_not(tmp_path):
    writer = Writer(tmp_path)
    outer = writer.span(semconv.GENERATE, 0, 5)
    writer.span(semconv.ENGINE_GENERATE, 0, 5, under=outer)
    writer.span(semconv.ENGINE_INIT, 6, None)
    assert summarize(tmp_path).outside_steps == pytest.approx({"generate": 5.0})


def test_cycles_are_in_order_of_time_also_where_a_record_comes_late(tmp_path):
    """A sleep whose end is missing is read last."""
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 20)
    writer.span(semconv.SLEEP, 1, None, under=step, vgen__sleep__level=1)
    writer.span(semconv.WAKE_UP, 4, 5, under=step)
    writer.span(semconv.SLEEP, 6, 7, under=step, vgen__sleep__level=2)
    writer.span(semconv.WAKE_UP, 9, 12, under=step)
    found = summarize(tmp_path).memory
    assert [(cycle.level, cycle.wake_seconds, cycle.asleep_seconds) for cycle in found] == [
        (1, pytest.approx(1.0), None),
        (2, pytest.approx(3.0), pytest.approx(2.0)),
    ]
