"""What changed between two runs, and the exit status that CI sees."""

from __future__ import annotations

import io
import json
import re

import pytest
from helpers.handmade import Writer, usual_run, usual_step, words
from rich.console import Console

from vgen.cli import main
from vgen.profiling import semconv
from vgen.recordings.report.compare import compare
from vgen.recordings.report.figures import summarize
from vgen.recordings.report.render import render_changes


@pytest.fixture
def runs(tmp_path):
    usual_run(tmp_path / "before", slow=None)
    usual_run(tmp_path / "same", slow=None)
    writer, at = Writer(tmp_path / "worse"), 0.0
    for number in range(1, 5):
        at = usual_step(writer, number, at, longest=1.3, update=0.5) + 1
    return tmp_path


def test_nothing_changed(runs, capsys):
    assert main(["report", str(runs / "same"), "--compare", str(runs / "before")]) == 0
    said = words(capsys.readouterr().out)
    assert "step [s] 2.600 2.600 +0.0 %" in said
    assert "worse" not in said


def test_a_regression_is_exit_status_3_and_told(runs, capsys):
    assert main(["report", str(runs / "worse"), "--compare", str(runs / "before")]) == 3
    said = words(capsys.readouterr().out)
    assert "step: generate [s] 1 1.300 +30.0 % worse" in said
    assert "step: update [s] 1 0.500 -50.0 % better" in said
    # the other way round the update is what got worse
    assert main(["report", str(runs / "before"), "--compare", str(runs / "worse")]) == 3
    assert "step: update [s] 0.500 1 +100.0 % worse" in words(capsys.readouterr().out)


def test_the_threshold_decides(runs, capsys):
    arguments = ["report", str(runs / "worse"), "--compare", str(runs / "before"), "--json"]
    assert main([*arguments, "--threshold", "400"]) == 0
    assert main([*arguments, "--threshold", "29"]) == 3
    changes = json.loads(capsys.readouterr().out.strip().split("\n")[-1])["changes"]
    (generate,) = [one for one in changes if one["name"] == "step: generate"]
    assert generate["percent"] == pytest.approx(30.0)
    assert generate["worse"]


def test_a_reports_json_is_as_good_as_its_run(runs, capsys):
    assert main(["report", str(runs / "before"), "--json"]) == 0
    kept = runs / "baseline.json"
    kept.write_text(capsys.readouterr().out)
    assert main(["report", str(runs / "worse"), "--compare", str(kept)]) == 3
    assert main(["report", str(runs / "same"), "--compare", str(kept)]) == 0


def test_what_cannot_be_compared_is_said(runs, capsys):
    (runs / "not.json").write_text("[1]")
    (runs / "nearly.json").write_text('{"steps":[1],"total":{"phases":[]},"syncs":[],"memory":{}}')
    for other, said in (
        (runs / "nearly.json", "is not what `vgen report --json` prints"),
        (runs / "not.json", "is not what `vgen report --json` prints"),
        (runs / "nowhere", "holds no spans to compare with"),
    ):
        assert main(["report", str(runs / "same"), "--compare", str(other)]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["report", str(runs / "same"), "--threshold", "-1"])
    assert left.value.code == 2


def test_what_got_worse_is_red_and_what_got_better_green(runs):
    changes = compare(summarize(runs / "before"), summarize(runs / "worse"), 5.0)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=120)
    console.print(render_changes(changes, "before", 5.0))
    lines = console.file.getvalue().splitlines()
    colors = {
        name: re.findall(r"\x1b\[(3\dm)", line)
        for name in ("generate [s]", "update [s]")
        for line in lines
        if name in line
    }
    assert set(colors["generate [s]"]) == {"31m"}
    assert set(colors["update [s]"]) == {"32m"}


def one_step(folder, *, rate=1.0, request=1.0, sync=True):
    writer = Writer(folder)
    step = writer.step(1, 0, 10)
    writer.generate(step, 0, 5, [(0, request)])
    if sync:
        writer.span(semconv.WEIGHT_SYNC, 6, 7, under=step, vgen__weight_sync__bytes=rate * 1e9)
    writer.span(semconv.SLEEP, 8, 9, under=step, vgen__sleep__level=1, vgen__memory__device__bytes=1000)
    return summarize(folder)


def test_a_figure_that_one_run_lacks_does_not_hide_the_others(tmp_path):
    changes = compare(one_step(tmp_path / "a", sync=False), one_step(tmp_path / "b"), 5.0)
    names = [change.name for change in changes]
    assert "sleep: bytes freed" in names
    assert "sync: rate" not in names


def test_the_noise_of_a_steps_seconds_is_no_measure_for_requests_and_rates(tmp_path):
    """Steps of ten seconds have a noise that is more than these figures themselves."""
    before = one_step(tmp_path / "before", rate=0.004, request=0.002)
    after = one_step(tmp_path / "after", rate=0.002, request=0.004)
    verdicts = {change.name: change.worse for change in compare(before, after, 5.0)}
    assert verdicts["request: e2e p50"]
    assert verdicts["sync: rate"]
