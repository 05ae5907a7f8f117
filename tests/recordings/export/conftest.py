"""The browser, where there is one, and a step with everything that an export must show."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.chromium import Chromium, executable
from helpers.handmade import Writer

from vgen.cli import main
from vgen.profiling import semconv
from vgen.recordings.reader.run import SpanRecord
from vgen.recordings.reader.selection import select


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    if executable() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    pytest.importorskip("aiohttp", reason="Chromium is driven over aiohttp: pip install 'vgen[server]'")
    with Chromium() as chromium:
        yield chromium


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two ranks on two hosts, one clock ahead, with an error, an event, links, a span that never ended."""
    folder = tmp_path / "run"
    for rank in (0, 1):
        writer = Writer(folder, host=f"host{rank}", pid=7, rank=rank, ahead=500.0 * rank)
        step = writer.step(4, 0, 10)
        writer.generate(step, 0, 4, [(0, 3), (0, 4), (0.5, 2)], spans=3)
        record = writer.span("update", 4, 8, under=step, error="ValueError", ratio=0.5, tags=["a", "b"], large=1 << 70)
        record |= {
            "events": [{"name": "exception", "unix_ns": writer.at(8), "attributes": {"exception.type": "ValueError"}}]
        }
        record |= {
            "links": [{"trace_id": "ab" * 16, "span_id": "cd" * 8, "attributes": {}}],
            "span_id": f"{rank + 1:x}" * 16,
        }
        writer.line(record)
        writer.span(semconv.WEIGHT_SYNC, 9, None, under=step)
    return folder


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Callable[[str], Any]:
    """Exports step 4 of the run in a format, and returns the JSON."""

    def export(form: str) -> Any:
        file = tmp_path / f"out.{form}"
        assert main(["trace", str(run), "--step", "4", f"--{form}", str(file)]) == 0
        return json.loads(file.read_text())

    return export


@pytest.fixture
def spans(run: Path) -> dict[str, SpanRecord]:
    """The spans of step 4, by ID."""
    return {span.span_id: span for span in select(run, 4).spans}
