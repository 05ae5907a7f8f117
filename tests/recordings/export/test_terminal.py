"""The waterfall in a terminal."""

from __future__ import annotations

import io
import re

import pytest
from helpers.handmade import Writer, usual_run
from rich.console import Console

from vgen.cli import main
from vgen.profiling import semconv
from vgen.recordings.export.terminal import waterfall
from vgen.recordings.reader.selection import select


def drawn(place, width: int, *, color: bool = False, step: int | None = None) -> str:
    chosen = select(place, step)
    system = "truecolor" if color else None
    console = Console(file=io.StringIO(), width=width, color_system=system, force_terminal=color, highlight=False)
    console.print(waterfall(chosen.spans, width=width, now_ns=chosen.end_ns))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_bars_lie_where_the_spans_did(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10)
    writer.span("first", 0, 5, under=step)
    writer.span("second", 5, 10, under=step)
    step_line, first, second = drawn(tmp_path, 100).splitlines()[:3]
    assert first.startswith("  first")
    half = first.count("█")
    assert step_line.count("█") == pytest.approx(2 * half, abs=1)
    assert second.index("█") == pytest.approx(first.index("█") + half, abs=1)
    assert first.rstrip().endswith("5.00 s")


@pytest.mark.parametrize("width", [20, 30, 40, 60, 120, 200])
def test_any_width_holds_it(tmp_path, width):
    usual_run(tmp_path, steps=1)
    lines = drawn(tmp_path, width).splitlines()
    assert len(lines) == 12
    assert max(map(len, lines)) <= width
    assert all(re.search(r"\d(\.\d+)? (s|ms|µs)$", line.rstrip()) for line in lines), lines
    assert ("█" in "".join(lines)) == (width >= 36)


def test_failed_and_open_spans_are_red_and_named(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, None)
    writer.span(semconv.GENERATE, 0, 2, under=step, error="EngineError")
    writer.span("update", 2, 6, under=step)
    red = "\x1b[31m"
    step_line, generate, update = drawn(tmp_path, 100, color=True).splitlines()
    assert red in step_line
    assert "6 s …" in step_line
    assert red in generate
    assert "✗ EngineError" in generate
    assert red not in update


def test_no_colour_when_piped(tmp_path, capsys):
    usual_run(tmp_path)
    assert main(["trace", str(tmp_path)]) == 0
    assert "\x1b[" not in capsys.readouterr().out


def test_a_step_of_several_ranks_shows_all_of_them(tmp_path):
    for rank in (0, 1):
        writer = Writer(tmp_path, pid=rank, rank=rank)
        step = writer.step(1, 0, 5)
        writer.span(semconv.GENERATE, 0, 2 + rank, under=step)
    lines = drawn(tmp_path, 100, step=1).splitlines()
    assert [line.split()[0:3] for line in lines if "train.step" in line] == [
        ["train.step", "[rank", "0]"],
        ["train.step", "[rank", "1]"],
    ]
