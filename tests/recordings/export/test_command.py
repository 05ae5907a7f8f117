"""The command `vgen trace`: formats, limits and messages."""

from __future__ import annotations

import pytest
from helpers.handmade import Writer, usual_run

from vgen.cli import main


def test_several_files_from_one_reading(tmp_path):
    usual_run(tmp_path / "run")
    files = {form: tmp_path / form for form in ("html", "chrome", "jaeger", "otlp", "svg")}
    arguments = [part for form, file in files.items() for part in (f"--{form}", str(file))]
    assert main(["trace", str(tmp_path / "run"), *arguments]) == 0
    assert all(file.stat().st_size > 1000 for file in files.values())


def test_very_many_spans_are_thinned_to_the_longest(tmp_path, capsys):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 1000)
    for number in range(900):
        error = "EngineError" if number == 3 else None
        writer.span(f"part{number}", number, number + 0.0001 * (number + 1), under=step, error=error)
    assert main(["trace", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert "601 of 901 spans are not shown: the shortest" in output.err
    assert len(output.out.splitlines()) == 300
    assert "train.step" in output.out
    assert "part899" in output.out
    assert "part3 ✗ EngineError" in output.out
    assert "part100 " not in output.out


@pytest.mark.fault(
    point="who watches or exports a run",
    did="The export's file cannot be written",
    happens="A message and status 2",
    within=20,
)
def test_a_file_that_cannot_be_written_is_said(tmp_path, capsys):
    usual_run(tmp_path)
    assert main(["trace", str(tmp_path), "--html", str(tmp_path / "no" / "such" / "folder.html")]) == 2
    assert "cannot write" in capsys.readouterr().err
