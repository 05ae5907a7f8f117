"""`vgen demo` as a user runs it: in a process, on the real engine, with the record that it writes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import threading

import pytest
from helpers.demos import ENVIRONMENT, command
from helpers.recorded_run import read_run

from vgen.recordings.reader.run import children


def vgen(*arguments: str, **more) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return subprocess.run(command(*arguments), text=True, timeout=240, env=ENVIRONMENT, **streams)


@pytest.fixture(scope="module")
def recorded_demo(demo):
    done = demo.done()
    assert done.returncode == 0, done.stderr
    return demo.folder / "run", done


@pytest.fixture(scope="module")
def watched(recorded_demo, tmp_path_factory):
    """A second run, of the first run's model, on a terminal: its folder, its output, and what the terminal showed."""
    place = tmp_path_factory.mktemp("demo") / "own"
    terminal, process = pty.openpty()
    shown: list[bytes] = []

    def watch() -> None:
        with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
            while some := os.read(terminal, 1 << 16):
                shown.append(some)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = str(recorded_demo[0] / "model")
    done = vgen("demo", "--steps", "1", "--model", model, "--out", str(place), stderr=process)
    os.close(process)
    watcher.join(10)
    os.close(terminal)
    return place, done, b"".join(shown).decode(errors="replace")


def test_json_is_one_object_and_nothing_else(recorded_demo):
    place, done = recorded_demo
    result = json.loads(done.stdout)
    assert [step["step"] for step in result["steps"]] == [1, 2]
    assert result["max_logprob_difference"] <= 1e-4
    assert result["output_tokens"] == sum(step["output_tokens"] for step in result["steps"]) > 0
    assert result["sync_bytes"] == sum(step["sync_bytes"] for step in result["steps"]) > 0
    assert result["trace_file"].startswith(str(place))
    for step in result["steps"]:
        for name in ("generate", "sync", "update", "sleep", "wake_up"):
            assert step[f"{name}_seconds"] > 0


def test_the_record_reads_back_as_whole_traces(recorded_demo):
    place, _ = recorded_demo
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


@pytest.mark.slow
def test_two_runs_with_the_same_seed_share_no_id(recorded_demo, watched):
    first, second = (read_run(place).spans for place, *_ in (recorded_demo, watched))
    assert first
    assert second
    for kind in ("span_id", "trace_id"):
        assert not {getattr(span, kind) for span in first} & {getattr(span, kind) for span in second}


def test_trace_shows_the_recorded_run(recorded_demo, tmp_path):
    place, _ = recorded_demo
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


def test_report_adds_up(recorded_demo, tmp_path):
    place, done = recorded_demo
    printed = vgen("report", str(place), "--json")
    assert (printed.returncode, printed.stderr) == (0, "")
    report, demo = json.loads(printed.stdout), json.loads(done.stdout)
    assert [step["step"] for step in report["steps"]] == [1, 2]
    run = read_run(place)
    for told, ran in zip(report["steps"], demo["steps"], strict=True):
        syncs = [span for span in run.step(told["step"]) if span.name == "vgen.weight_sync"]
        recorded_seconds = sum(span.end_ns - span.start_ns for span in syncs) / 1e9
        assert sum(told["phases"].values()) == pytest.approx(told["seconds"])
        assert told["phases"]["generate"] == pytest.approx(ran["generate_seconds"])
        assert told["phases"]["sync"] == pytest.approx(recorded_seconds, abs=1e-6)
        assert 0.8 * recorded_seconds < ran["sync_seconds"] <= recorded_seconds  # measured within the span
        assert told["phases"]["update"] == pytest.approx(ran["update_seconds"])
        assert told["phases"]["rest"] <= 0.02 * told["seconds"] + 0.05
        assert told["output_tokens"] == ran["output_tokens"]
        assert told["tail"]["sequences"] == told["requests"]["e2e"]["count"] == 32
    first, *others = report["syncs"]
    assert (first["step"], first["version"]) == (None, "step-0")  # the first weights come before the first step
    assert sum(sync["bytes"] for sync in others) == demo["sync_bytes"]
    assert report["outside_steps"]["init"] > 0
    shown = vgen("report", str(place), "--step", "2")
    assert shown.returncode == 0, shown.stderr
    assert "where the time went" in shown.stdout
    assert vgen("report", str(place), "--compare", str(place)).returncode == 0
    page = tmp_path / "trace.html"
    assert vgen("trace", str(place), "--step", "2", "--html", str(page)).returncode == 0
    assert "vgen.weight_sync.load" in page.read_text()


@pytest.mark.slow
def test_the_users_model_the_table_and_the_progress_bar(watched):
    place, done, terminal = watched
    assert done.returncode == 0, terminal
    for expected in ("tokens/s", "GB/s", "train.step", "max |Δ| = ", f"recorded in {place}"):
        assert expected in done.stdout
    assert float(done.stdout.partition("max |Δ| = ")[2].split()[0]) <= 1e-4
    for expected in ("starting vLLM", "step 1/1 generate", "step 1/1 update", "step 1/1 sync", "32/32"):
        assert expected in terminal
    assert "WARNING" not in terminal, "what vLLM has to say is in engine.log"


@pytest.mark.slow
def test_an_invalid_model_is_an_error_on_standard_error_only(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = vgen("demo", "--out", str(tmp_path / "run"), "--model", str(tmp_path), "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert "engine.log" in done.stderr
