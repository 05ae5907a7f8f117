"""Spans as columns, read quickly where the lines allow it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.handmade import BEGIN, Writer, ns, usual_run

from vgen.profiling import semconv
from vgen.recordings.reader.recording import OPEN, Recording
from vgen.recordings.reader.requests import NO_STEP
from vgen.recordings.report.figures import summarize


def test_the_quick_way_and_the_thorough_one_read_the_same(tmp_path):
    """Lines of the writer's form are not parsed as a whole; with a space in them they are."""
    usual_run(tmp_path / "quick", steps=3)
    other = tmp_path / "thorough"
    other.mkdir()
    (file,) = (tmp_path / "quick").glob("*.jsonl")
    head, *rest = file.read_text().splitlines()
    spaced = [json.dumps(json.loads(line)) for line in rest]
    (other / file.name).write_text("\n".join([head, *spaced]) + "\n")
    quick, thorough = summarize(tmp_path / "quick"), summarize(other)
    assert replace(quick, run="") == replace(thorough, run="")
    assert len(Recording(other)) == len(Recording(tmp_path / "quick"))


def test_each_span_is_a_row_and_requests_are_only_counted(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(3, 0, 5)
    writer.generate(step, 0, 2, [(0, 1), (0, 2)], spans=2)
    alone = writer.span("alone", 6, 7)
    recording = Recording(tmp_path)
    assert len(recording) == 6
    rows = {recording.span_name(row): row for row in range(len(recording.name))}
    assert rows.keys() == {semconv.STEP, semconv.GENERATE, semconv.ENGINE_GENERATE, "alone"}
    row = rows["alone"]
    assert (recording.start[row], recording.end[row]) == (BEGIN + ns(6), BEGIN + ns(7))
    assert (recording.span_id[row], recording.parent_id[row]) == (int(alone["span_id"], 16), 0)
    assert (recording.step[row], recording.step_number(row)) == (NO_STEP, None)
    assert recording.seconds(row) == 1.0
    inner, outer = rows[semconv.ENGINE_GENERATE], rows[semconv.GENERATE]
    assert recording.parent_id[inner] == recording.span_id[outer]
    assert recording.key(inner) == recording.key(rows[semconv.STEP])
    assert recording.step_number(inner) == 3


def test_a_span_that_never_ended_is_open_and_one_that_ended_later_is_not(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, None)
    writer.span("update", 1, None, under=step, span_id="ab" * 8)
    writer.span("update", 1, 2, under=step, span_id="ab" * 8)
    recording = Recording(tmp_path)
    ends = {recording.span_name(row): recording.end[row] for row in range(len(recording.name))}
    assert ends == {semconv.STEP: OPEN, "update": BEGIN + ns(2)}
    assert recording.attributes[1][semconv.STEP_NUMBER] == 1
    assert recording.seconds(1) is None


def test_processes_with_the_same_rank_are_told_apart(tmp_path):
    for pid, rank in ((1, 0), (2, 0), (3, 1)):
        Writer(tmp_path, pid=pid, rank=rank).span("x", 0, 1)
    labels = [process.label for process in Recording(tmp_path).processes]
    assert labels == ["rank 0 (one:1)", "rank 0 (one:2)", "rank 1"]


@pytest.mark.parametrize("wrong", [{"span_id": "f" * 20}, {"parent_id": "f" * 20}, {"start_unix_ns": -(1 << 63)}])
@pytest.mark.fault(
    point="clocks of a recorded run",
    did="Times and ids are beyond 64 bits",
    happens="The record is left out; the others stay right",
    within=20,
)
def test_a_record_that_no_column_can_hold_is_left_out_whole(tmp_path, wrong):
    writer = Writer(tmp_path)
    record = writer.step(1, 0, 10)
    writer.line({**record, "span_id": "12" * 8, **wrong})
    writer.step(2, 10, 20)
    recording = Recording(tmp_path)
    columns = (
        *(recording.name, recording.span_id, recording.parent_id, recording.start, recording.end),
        *(recording.step, recording.trace, recording.process),
    )
    assert [len(column) for column in columns] == [2] * 8
    assert list(recording.step) == [1, 2]
