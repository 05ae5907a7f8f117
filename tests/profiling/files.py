"""JSONL records in tests: read strictly, and checked as a whole; and programs that write them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vgen.analysis.run import Run, read_run


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def lines(place: Path) -> list[dict[str, Any]]:
    """Every line of a file, or of the files in a folder, each strict JSON and ended."""
    found: list[dict[str, Any]] = []
    for file in sorted(place.glob("*.jsonl")) if place.is_dir() else [place]:
        text = file.read_bytes().decode("utf-8")
        assert not text or text.endswith("\n")
        own = [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]
        assert own[0]["type"] == "header"
        found += own
    return found


def of_type(place: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines(place) if line["type"] == kind]


def read_whole(place: Path) -> Run:
    """The run, when it is one: nothing unreadable, no id twice, every parent there and around its children."""
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
    """A program of its own, from a file so that it may spawn others."""
    script = folder / "program.py"
    script.write_text(code)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path, code: str, *arguments: object, timeout: float = 30, returns: int = 0) -> tuple[str, str]:
    """Run a program to its end; what it wrote to both streams."""
    process = start(folder, code, *arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it hangs\n{out}\n{err}") from None
    assert process.returncode == returns, err
    return out, err
