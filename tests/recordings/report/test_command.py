"""The command `vgen report`: what it prints, where, and its exit status."""

from __future__ import annotations

import json

import pytest
from helpers.handmade import usual_run

from vgen.cli import main


@pytest.fixture
def run(tmp_path):
    return usual_run(tmp_path / "run")


def test_it_prints_words_or_one_json_object(run, capsys):
    assert main(["report", str(run)]) == 0
    assert "where the time went" in capsys.readouterr().out
    assert main(["report", str(run), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["steps"]) == 4


def test_one_step_says_why(run, capsys):
    assert main(["report", str(run), "--step", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in report["steps"]] == [2]
    assert report["why"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--step", "77"], "holds no step 77; it has"), (["--compare", "nothing.json"], "is not what")],
)
def test_nothing_to_report_is_status_1_and_a_message_on_standard_error(run, tmp_path, capsys, arguments, message):
    (tmp_path / "nothing.json").write_text('{"not": "a report"}')
    arguments = [str(tmp_path / each) if each.endswith(".json") else each for each in arguments]
    assert main(["report", str(run), *arguments]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_something_worse_is_status_3_and_the_same_run_is_status_0(run, tmp_path, capsys):
    slower = usual_run(tmp_path / "slower", longest=30.0)
    assert main(["report", str(slower), "--compare", str(run)]) == 3
    assert main(["report", str(run), "--json"]) == 0
    baseline = tmp_path / "baseline.json"
    baseline.write_text(capsys.readouterr().out.splitlines()[-1])
    assert main(["report", str(run), "--compare", str(baseline)]) == 0


def test_what_is_wrong_with_the_run_to_compare_with_is_said(run, tmp_path, capsys):
    other = usual_run(tmp_path / "other")
    (file,) = other.glob("*.jsonl")
    file.write_text(file.read_text() + "no record\n")
    main(["report", str(run), "--compare", str(other)])
    assert f"vgen report: {other}: " in capsys.readouterr().err
