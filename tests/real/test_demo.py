"""`vgen demo` as a user runs it: its own process, the real engine, the record it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vgen.analysis.run import children, read_run

HUSH = {**os.environ, "PYTHONHASHSEED": "0"}


def vgen(*arguments: str, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vgen.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=HUSH, **more)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    place = tmp_path_factory.mktemp("demo") / "run"
    # random.seed(0) before anything else: ids drawn from `random` would collide between runs and ranks
    code = "import random, sys; random.seed(0); from vgen.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "demo", "--steps", "2", "--out", str(place), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return place, done


def test_json_is_one_object_and_nothing_else(recorded):
    place, done = recorded
    result = json.loads(done.stdout)
    assert [step["step"] for step in result["steps"]] == [1, 2]
    assert result["max_logprob_difference"] <= 1e-4
    assert result["output_tokens"] == sum(step["output_tokens"] for step in result["steps"]) > 0
    assert result["sync_bytes"] == sum(step["sync_bytes"] for step in result["steps"]) > 0
    assert result["trace_file"].startswith(str(place))
    for step in result["steps"]:
        for name in ("generate", "sync", "update", "sleep", "wake_up"):
            assert step[f"{name}_seconds"] > 0


def test_the_record_reads_back_as_whole_traces(recorded):
    place, _ = recorded
    run = read_run(place)
    assert run.problems == []
    assert [number for number, _ in run.rows] == [1, 2]
    spans = {span.span_id: span for span in run.spans}
    assert len(spans) == len(run.spans) > 20
    for span in run.spans:
        assert span.end_ns is not None
        if span.parent_id is not None:
            parent = spans[span.parent_id]
            assert parent.trace_id == span.trace_id
            assert parent.start_ns <= span.start_ns <= span.end_ns <= parent.end_ns
    for number in (1, 2):
        trace = run.step(number)
        (root,) = children(trace)[None]
        assert root.name == "train.step"
        found = {span.name for span in trace}
        assert {"vgen.generate", "vgen.weight_sync", "vgen.sleep", "vgen.wake_up", "update", "reward"} <= found
    second = run.step(2)[0]
    assert [link["span_id"] for link in second.links] == [run.step(1)[0].span_id]


def test_two_runs_with_the_same_seed_share_no_id(recorded, tmp_path):
    code = "import random; random.seed(0); from vgen.profiling.ids import new_span_id; print(new_span_id())"
    first, second = (subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2))
    assert first != second


def test_trace_draws_it_again(recorded, tmp_path):
    place, _ = recorded
    drawn = vgen("trace", str(place), "--step", "2")
    assert drawn.returncode == 0, drawn.stderr
    assert "vgen.weight_sync.load" in drawn.stdout
    assert "█" in drawn.stdout
    assert "\x1b[" not in drawn.stdout
    picture = tmp_path / "trace.svg"
    assert vgen("trace", str(place), "--step", "2", "--svg", str(picture)).returncode == 0
    text = picture.read_text()
    assert "vgen.generate" in text
    assert "url(" not in text.replace("url(#", "")
    assert vgen("trace", str(place), "--step", "99").returncode == 1
    assert vgen("trace", str(tmp_path)).returncode == 1


def test_report_adds_up(recorded, tmp_path):
    place, done = recorded
    printed = vgen("report", str(place), "--json")
    assert (printed.returncode, printed.stderr) == (0, "")
    report, demo = json.loads(printed.stdout), json.loads(done.stdout)
    assert [step["step"] for step in report["steps"]] == [1, 2]
    for told, ran in zip(report["steps"], demo["steps"], strict=True):
        assert sum(told["phases"].values()) == pytest.approx(told["seconds"])
        assert told["phases"]["generate"] == pytest.approx(ran["generate_seconds"])
        assert told["phases"]["sync"] == pytest.approx(ran["sync_seconds"], rel=0.02, abs=0.002)
        assert told["phases"]["update"] == pytest.approx(ran["update_seconds"])
        assert told["phases"]["rest"] <= 0.02 * told["seconds"] + 0.05
        assert told["output_tokens"] == ran["output_tokens"]
        assert told["tail"]["sequences"] == told["requests"]["e2e"]["count"] == 32
    assert sum(sync["bytes"] for sync in report["syncs"]) == demo["sync_bytes"]
    assert report["outside_steps"]["init"] > 0
    shown = vgen("report", str(place), "--step", "2")
    assert shown.returncode == 0, shown.stderr
    assert "where the time went" in shown.stdout
    assert vgen("report", str(place), "--compare", str(place)).returncode == 0
    page = tmp_path / "trace.html"
    assert vgen("trace", str(place), "--step", "2", "--html", str(page)).returncode == 0
    assert "vgen.weight_sync.load" in page.read_text()


def test_a_model_of_ones_own_and_the_table(recorded, tmp_path):
    place, _ = recorded
    done = vgen("demo", "--steps", "1", "--model", str(place / "model"), "--out", str(tmp_path / "own"))
    assert done.returncode == 0, done.stderr
    for expected in ("tokens/s", "GB/s", "train.step", "max |Δ| = ", "recorded in "):
        assert expected in done.stdout
    assert float(done.stdout.partition("max |Δ| = ")[2].split()[0]) <= 1e-4


def test_what_cannot_work_is_said_before_the_engine_starts(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for arguments, said in (
        (("--out", str(file / "run")), "cannot write"),
        (("--out", str(tmp_path / "run"), "--model", str(tmp_path)), "no config.json"),
        (("--steps", "0"), "at least 1"),
    ):
        done = vgen("demo", *arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
