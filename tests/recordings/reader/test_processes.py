"""Whatever lies in a run's directory: a picture of what can be shown and a sentence on what could not."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers.handmade import Writer, usual_run, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vgen.cli import main
from vgen.profiling import semconv
from vgen.recordings.report.figures import summarize


def both(place, capsys, *, status: int = 0) -> str:
    """What `report` and `trace` print together; each must end with `status`, and neither with a stack trace."""
    said = ""
    for arguments in (["report", str(place)], ["trace", str(place)], ["trace", str(place), "--step", "1"]):
        assert main(arguments) == status, arguments
        output = capsys.readouterr()
        said += output.out + output.err
    return words(said)


def test_nothing_there(tmp_path, capsys):
    assert "no record (*.jsonl) in" in both(tmp_path, capsys, status=1)
    assert "does not exist" in both(tmp_path / "nowhere", capsys, status=1)
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no spans" in both(tmp_path, capsys, status=1)


@pytest.mark.fault(
    point="the files of a recorded run",
    did="A file ends in the middle of a line",
    happens="The rest is shown",
    within=20,
)
def test_cut_off_in_the_middle_of_a_line(tmp_path, capsys):
    usual_run(tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    said = both(tmp_path, capsys)
    assert f"{file.name}: 1 line cut off or damaged" in said
    assert "where the time went" in said
    assert "█" in said


def test_of_a_newer_version(tmp_path, capsys):
    usual_run(tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    head, _, rest = file.read_text().partition("\n")
    newer = {**json.loads(head), "format": 3, "vgen": "9.0.0"}
    later = {"type": "profile", "frames": [1, 2]}
    file.write_text(json.dumps(newer, separators=(",", ":")) + "\n" + json.dumps(later) + "\n" + rest)
    said = both(tmp_path, capsys)
    assert "is of a newer vgen (9.0.0): read as far as known" in said
    assert "damaged" not in said


def test_a_span_that_never_closed(tmp_path, capsys):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, None)
    writer.span("update", 0, 1, under=step)
    writer.span(semconv.WEIGHT_SYNC, 1, None, under=step)
    said = both(tmp_path, capsys)
    assert "2 spans never ended: train.step, vgen.weight_sync" in said
    assert "1 (open)" in said
    assert "it never ended" in words(" ".join(summarize_why(tmp_path)))


def summarize_why(place):
    from vgen.recordings.report.verdict import explain

    usual = Writer(place, pid=7)
    usual.step(2, -5, -4.9)
    return explain(summarize(place), 1)


def test_no_steps(tmp_path, capsys):
    Writer(tmp_path).span(semconv.GENERATE, 0, 5)
    assert main(["report", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert "no step was recorded" in output.err
    assert "outside of steps: generate 5.00 s" in output.out
    assert main(["report", str(tmp_path), "--step", "4"]) == 1
    assert "holds no step 4" in capsys.readouterr().err


def test_a_step_that_is_not_there(tmp_path, capsys):
    usual_run(tmp_path)
    assert main(["report", str(tmp_path), "--step", "99"]) == 1
    assert "holds no step 99; it has 1 to 4" in capsys.readouterr().err
    assert main(["trace", str(tmp_path), "--step", "99"]) == 1
    assert "holds no step 99" in capsys.readouterr().err


@pytest.mark.fault(
    point="the files of a recorded run",
    did="The first parts were deleted",
    happens="The rest is shown, and that is said",
    within=20,
)
def test_the_first_parts_were_deleted(tmp_path, capsys):
    usual_run(tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    file.rename(file.with_name(file.name.replace("-0000", "-0003")))
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text().replace('"part":0', '"part":3'))
    assert "the first 3 files of rank 0 were deleted, and what was in them" in both(tmp_path, capsys)


@contextmanager
def without_roots_rights():
    """Root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.fault(
    point="the files of a recorded run",
    did="A file may not be read",
    happens="It is named, and the rest is shown",
    within=20,
)
def test_a_file_that_may_not_be_read(capsys):
    with tempfile.TemporaryDirectory() as name:  # pytest's own are for their owner alone
        folder = Path(name)
        folder.chmod(0o755)
        usual_run(folder)
        assert "cannot be read" not in both(folder, capsys)  # what is imported late is here from now on
        Writer(folder, pid=2).path.chmod(0)
        with without_roots_rights():
            assert "cannot be read: Permission denied" in both(folder, capsys)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "null",
        '"type"',
        "{}",
        '{"type":7}',
        '{"type":"end"}',
        '{"type":"end","name":[],"trace_id":{},"span_id":1,"start_unix_ns":"x","end_unix_ns":null,"attributes":[]}',
        '{"type":"end","name":"a","trace_id":"b","span_id":"no hex","start_unix_ns":1,"end_unix_ns":2,"attributes":{}}',
        '{"type":"end","name":"a","trace_id":"b","span_id":"1","start_unix_ns":1,"end_unix_ns":1234567890123456789012,"attributes":{}}',
        '{"type":"start","name":"a","trace_id":"b","span_id":"zz","start_unix_ns":1,"attributes":{}}',
        '{"type":"measurement","name":"vgen.request.e2e","values":[{}],"attributes":{}}',
        '{"type":"measurement","name":"vgen.request.e2e","values":["x"],"attributes":{}}',
        '{"type":"step","number":"one","summary":{}}',
        '{"type":"header","format":"new"}',
        "[" * 100_000,
        '{"type":"end",' + "\0" * 1000,
        "\udcff\udcfe",
    ],
)
@pytest.mark.fault(
    point="the files of a recorded run",
    did="A line is damaged",
    happens="It is counted, and the rest is shown",
    within=20,
)
def test_a_damaged_line_is_counted_and_the_rest_is_shown(tmp_path, capsys, line):
    usual_run(tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    with file.open("ab") as content:
        content.write(line.encode("utf-8", "surrogateescape") + b"\n")
    summary = summarize(tmp_path)
    assert any("1 line cut off or damaged" in problem for problem in summary.problems), summary.problems
    assert summary.total.steps == 4
    both(tmp_path, capsys)


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 5)
    outer = writer.generate(step, 0, 2, [(0, 1), (0, 2)])
    writer.measure(semconv.REQUEST_E2E, ["NaN", "Infinity", 3.0], under=outer)
    assert summarize(tmp_path).total.requests["e2e"].count == 3
    json.dumps(asdict(summarize(tmp_path)), allow_nan=False)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.fault(
    point="the files of a recorded run",
    did="Files are damaged at random",
    happens="A report or a message; never a traceback",
    within=60,
)
def test_no_damage_makes_a_stack_trace(tmp_path, capsys, data):
    """Bytes changed, cut out and swapped anywhere in a run's file."""
    folder = tmp_path / "run"
    if not folder.exists():
        usual_run(folder, steps=3)
        (tmp_path / "kept").write_bytes(next(folder.glob("*.jsonl")).read_bytes())
    content = bytearray((tmp_path / "kept").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.sampled_from([b"", b"9", b'"', b"{", b"\n", b"\xff", b"null", b"-", b"[1]", b"1e999"]))
        content[at : at + data.draw(st.integers(0, 30))] = piece
    next(folder.glob("*.jsonl")).write_bytes(bytes(content))
    for arguments in (
        ["report", str(folder)],
        ["report", str(folder), "--step", "2", "--json"],
        ["trace", str(folder)],
    ):
        assert main(arguments) in (0, 1)
    for form in ("html", "chrome", "jaeger", "otlp", "svg"):
        assert main(["trace", str(folder), "--step", "2", f"--{form}", str(tmp_path / "out")]) in (0, 1)
    capsys.readouterr()
