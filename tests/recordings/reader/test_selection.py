"""The spans of one step, or of the last trace."""

from __future__ import annotations

import json

from helpers.handmade import Writer, usual_run

from vgen.profiling import semconv
from vgen.recordings.reader.selection import select


def test_a_step_is_its_whole_trace_on_all_ranks(tmp_path):
    for rank in (0, 1):
        writer = Writer(tmp_path, pid=rank, rank=rank)
        for number in (1, 2):
            step = writer.step(number, 10 * number, 10 * number + 5)
            writer.span("update", 10 * number, 10 * number + 1 + rank, under=step)
    shown = select(tmp_path, 2)
    assert shown.title == "step 2"
    assert [span.name for span in shown.spans] == [semconv.STEP, semconv.STEP, "update", "update"]
    assert {span.process.label for span in shown.spans} == {"rank 0", "rank 1"}
    assert {span.attributes[semconv.STEP_NUMBER] for span in shown.spans} == {2}
    assert shown.problems == []
    assert select(tmp_path, 3).spans == []


def test_without_a_step_it_is_the_trace_that_began_last_and_not_the_shutdown(tmp_path):
    writer = Writer(tmp_path)
    writer.span(semconv.ENGINE_CLOSE, 0, 1)
    assert [span.name for span in select(tmp_path).spans] == [semconv.ENGINE_CLOSE]
    writer.span("later", 2, 9)
    writer.span("last", 3, 4)
    writer.span(semconv.ENGINE_CLOSE, 5, 6)
    assert [span.name for span in select(tmp_path).spans] == ["last"]


def test_lines_in_another_form_are_selected_too(tmp_path):
    usual_run(tmp_path / "quick")
    (file,) = (tmp_path / "quick").glob("*.jsonl")
    head, *rest = file.read_text().splitlines()
    (tmp_path / "thorough").mkdir()
    spaced = [json.dumps(json.loads(line)) for line in rest]
    (tmp_path / "thorough" / file.name).write_text("\n".join([head, *spaced]) + "\n")
    for step in (None, 2):
        quick, thorough = (select(tmp_path / name, step) for name in ("quick", "thorough"))
        assert [span.span_id for span in quick.spans] == [span.span_id for span in thorough.spans]
        assert quick.spans


def test_an_open_span_is_shown_to_the_last_record_and_said(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, None)
    writer.span("update", 1, 4, under=step)
    shown = select(tmp_path)
    assert shown.problems == ["1 span never ended: drawn to the last moment that was recorded"]
    assert shown.spans[0].end(shown.end_ns) == shown.spans[1].end_ns


def test_of_too_many_the_shortest_are_left_out_and_counted(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 100)
    for number in range(1, 11):
        writer.span(f"part{number}", 0, number, under=step)
    shown = select(tmp_path, 1, most=4)
    assert {span.name for span in shown.spans} == {semconv.STEP, "part8", "part9", "part10"}
    assert shown.problems == ["7 of 11 spans are not shown: the shortest"]
