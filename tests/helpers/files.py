"""JSONL records in tests, read strictly and checked as a whole; and programs that write them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.recorded_run import Run, read_run


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def lines(place: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, or of all files in a folder. Each must be strict JSON and end with a newline."""
    records: list[dict[str, Any]] = []
    for file in sorted(place.glob("*.jsonl")) if place.is_dir() else [place]:
        text = file.read_bytes().decode("utf-8")
        assert not text or text.endswith("\n")
        in_file = [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]
        assert in_file[0]["type"] == "header"
        records += in_file
    return records


def of_type(place: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines(place) if line["type"] == kind]


def read_whole(place: Path) -> Run:
    """Return the run after checks: it is readable, IDs are unique, each parent exists and encloses its children."""
    run = read_run(place)
    assert run.problems == []
    ended = [line["span_id"] for line in of_type(place, "end")]
    assert len(ended) == len(set(ended))
    spans = {span.span_id: span for span in run.spans}
    for span in run.spans:
        if span.parent_id is None:
            continue
        parent = spans[span.parent_id]
        assert parent.trace_id == span.trace_id
        assert parent.start_ns <= span.start_ns
        if parent.end_ns is not None and not span.rebuilt:
            assert span.end_ns is not None
            assert span.end_ns <= parent.end_ns
    return run


def start(folder: Path, code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program, from a file so that it can spawn others."""
    script = folder / "program.py"
    script.write_text(code)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path, code: str, *arguments: object, timeout: float = 30, returns: int = 0) -> tuple[str, str]:
    """Run a program to its end; return what it wrote to stdout and stderr."""
    process = start(folder, code, *arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it hangs\n{out}\n{err}") from None
    assert process.returncode == returns, err
    return out, err


def python_output(code: str) -> str:
    """Run code in a new interpreter; return what it wrote to stdout."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
