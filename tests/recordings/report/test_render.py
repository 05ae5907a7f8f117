"""The report in a terminal: which sections it has and what they show."""

from __future__ import annotations

import pytest
from helpers.handmade import Writer, usual_run, words

from vgen.cli import main
from vgen.profiling import semconv


def test_many_steps_are_not_all_shown(tmp_path, capsys):
    usual_run(tmp_path, steps=60, slow=5)
    assert main(["report", str(tmp_path)]) == 0
    table = capsys.readouterr().out.split("where the time went")[1].split("the tail")[0].split("\n")
    shown = [line.split()[0] for line in table if line.strip()[:1].isdigit() and "%" not in line]
    assert "5" in shown
    assert shown[-1] == "60"
    assert len(shown) == 24
    assert any("…" in line for line in table)


def test_of_one_step_there_are_only_its_own_figures(tmp_path, capsys):
    usual_run(tmp_path)
    assert main(["report", str(tmp_path), "--step", "3"]) == 0
    shown = words(capsys.readouterr().out)
    assert "1 sync, 300.00 MB at 1.000 GB/s" in shown
    assert "step 3 took 2.60 s" in shown
    assert "stragglers" not in shown
    assert "over the run" not in shown
    assert "why step" not in shown


def test_sections_without_content_are_left_out(tmp_path, capsys):
    Writer(tmp_path).step(1, 0, 1)
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "where the time went" in shown
    for section in ("the tail", "requests", "weight sync", "memory", "stragglers", "errors"):
        assert section not in shown


def test_what_servers_took_for_a_phase_and_how_many_syncs_failed(tmp_path, capsys):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10)
    sync = writer.span(semconv.WEIGHT_SYNC, 0, 4, under=step, vgen__weight_sync__paused=1.5)
    receivers = {"vgen__weight_sync__receiver__median": 0.5, "vgen__weight_sync__receiver__max": 2.0}
    writer.span(semconv.SYNC_LOAD, 0, 3, under=sync, **receivers)
    writer.span(semconv.WEIGHT_SYNC, 5, 6, under=step, error="WeightSyncError")
    assert main(["report", str(tmp_path)]) == 0
    shown = words(capsys.readouterr().out)
    assert "2 syncs, generation paused for 1.500 s, the slowest server took 2.000 s in load" in shown
    assert "the median 0.500 s, 1 failed" in shown


def test_the_slowest_requests_are_shown_with_all_that_is_known_of_them(tmp_path, capsys):
    writer = Writer(tmp_path)
    step = writer.step(4, 0, 10)
    writer.generate(step, 1, 9, [(2.0, 8.5)], tokens=[321], server="http://a:1", spans=1)
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    (row,) = [line.split() for line in shown.splitlines() if "6.500" in line and "321" in line]
    assert [row[0], row[1], row[2], row[3]] == ["4", "0", "0", "6.500"]
    assert row[-3:] == ["321", "stop", "http://a:1"]


def test_without_servers_there_is_no_column_for_them(tmp_path, capsys):
    usual_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.split("slowest requests")[1].split("weight sync")[0]
    assert "ended by" in shown
    assert "server" not in shown


@pytest.mark.parametrize("middle", [3_000_000, 9_000_000, 1_000_000])
def test_memory_that_grows_is_told_from_the_first_cycle_to_the_last(tmp_path, capsys, middle):
    writer = Writer(tmp_path)
    for number, resident in enumerate((3_000_000, middle, 5_000_000), 1):
        step = writer.step(number, 10 * number, 10 * number + 9)
        memory = {"vgen__memory__host__resident": resident, "vgen__memory__device__free": 8_000_000 - resident // 2}
        writer.span(semconv.SLEEP, 10 * number, 10 * number + 1, under=step, vgen__sleep__level=1)
        writer.span(semconv.WAKE_UP, 10 * number + 2, 10 * number + 3, under=step, **memory)
    assert main(["report", str(tmp_path)]) == 0
    shown = words(capsys.readouterr().out)
    assert "the host memory of rank 0 grew by 2.00 MB over 3 cycles" in shown
    assert "free device memory beside rank 0 fell by 1.00 MB over 3 cycles" in shown


def test_the_requests_of_one_step_are_its_own(tmp_path, capsys):
    usual_run(tmp_path)
    for arguments, count in (([], "40"), (["--step", "2"], "10")):
        assert main(["report", str(tmp_path), *arguments]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["e2e", "[s]"]]
        assert line.split()[2] == count
