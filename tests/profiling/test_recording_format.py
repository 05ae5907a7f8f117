"""The format of a recorded run: what is written is read back, quickly and thoroughly, with today's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.handmade import Writer
from hypothesis import given
from hypothesis import strategies as st

from vgen.profiling import ProfilingContext, recording_format, semconv
from vgen.profiling.recording_format import FORMAT, Header
from vgen.profiling.sinks.jsonl import JsonlSink


def written(folder: Path) -> list[str]:
    """The lines of the one file of a run."""
    (file,) = recording_format.files(folder)
    return file.read_text().splitlines(keepends=True)


def test_a_header_comes_back():
    header = Header(host="one", pid=7, part=3)
    line = recording_format.header_line(header)
    assert line.startswith(recording_format.HEADER_START)
    assert recording_format.parse_header(line) == header
    assert header.format == FORMAT == 2


@pytest.mark.parametrize("line", ["[]", "null", "{}", '{"type":"header","format":"new"}', "[" * 100_000, '{"type":'])
def test_a_damaged_header_is_a_value_error(line: str):
    with pytest.raises(ValueError, match=r"header|invalid literal|Expecting"):
        recording_format.parse_header(line)


def test_files_of_one_process_share_a_key_and_follow_each_other(tmp_path: Path):
    names = [recording_format.file_name("a-b", 7, 99, part) for part in (0, 1, 10)]
    for name in reversed(names):
        (tmp_path / name).touch()
    found = recording_format.files(tmp_path)
    assert [file.name for file in found] == names
    assert {recording_format.process_key(file) for file in found} == {"vgen-a-b-7-99"}
    assert recording_format.files(found[0]) == [found[0]]


def test_the_head_of_a_span_is_what_parsing_gives(tmp_path: Path):
    """For every line that the sink writes: spans with a step, without, with an error, open ones, and no spans."""
    with ProfilingContext([JsonlSink(tmp_path)], {semconv.RANK: 2}) as profiling:
        with profiling.step(7), profiling.span("reward", a=1) as reward:
            reward.event("half").link(reward)
        with pytest.raises(OSError, match="no"), profiling.span("update"):
            raise OSError("no")
        with profiling.span("open"):
            profiling.flush()
    header, *lines = written(tmp_path)
    assert recording_format.parse_header(header).part == 0
    heads = 0
    for line in lines:
        record, head = recording_format.parse(line), recording_format.span_head(line)
        if record["type"] not in ("start", "end"):
            assert head is None
            assert not recording_format.may_be_span(line)
            continue
        heads += 1
        ids = record["name"], record["trace_id"], record["span_id"], record["parent_id"]
        step = record["attributes"].get(semconv.STEP_NUMBER)
        assert head == (*ids, record["start_unix_ns"], record.get("end_unix_ns"), step)
        assert recording_format.may_be_span(line)
        assert recording_format.rank_in(line) == 2
    assert heads >= 5


def test_a_line_that_is_cut_off_has_no_head(tmp_path: Path):
    Writer(tmp_path).step(1, 0, 1)
    line = written(tmp_path)[-1]
    assert recording_format.span_head(line) is not None
    for length in range(len(line)):
        assert recording_format.span_head(line[:length]) is None


def test_a_line_in_another_form_may_be_a_span_and_has_no_head(tmp_path: Path):
    Writer(tmp_path).step(1, 0, 1)
    line = json.dumps(json.loads(written(tmp_path)[-1])) + "\n"
    assert recording_format.span_head(line) is None
    assert recording_format.may_be_span(line)
    assert recording_format.parse(line)["name"] == semconv.STEP


RENAME = recording_format.renamer(
    {"a.b": "a.b.first", "a": "z", "a.b.c": "a.b"}, {"m": "m.now", "m.age": "m.now.age", "a": "metric"}
)


def renamed(record: object) -> object:
    return json.loads(RENAME(json.dumps(record, separators=(",", ":"))))


def test_names_of_attributes_are_replaced_wherever_attributes_are():
    old, new = {"a.b": 1, "a": "a", "a.b.c": ["a"], "b": 2}, {"a.b.first": 1, "z": "a", "a.b": ["a"], "b": 2}
    for kind in ("start", "end"):
        events, links = [{"name": "a", "attributes": old}], [{"span_id": "1", "attributes": old}]
        now = {"type": kind, "name": "a", "attributes": new}
        now |= {"events": [{"name": "a", "attributes": new}], "links": [{"span_id": "1", "attributes": new}]}
        assert renamed({"type": kind, "name": "a", "attributes": old, "events": events, "links": links}) == now


def test_names_of_metrics_are_replaced_in_measurements_and_rows():
    measured = {"type": "measurement", "name": "m", "values": [1], "attributes": {"a": 1, "m": 2}}
    assert renamed(measured) == {**measured, "name": "m.now", "attributes": {"z": 1, "m": 2}}
    row = {"m": 1, "m.sum": 2, "m.p99": 3, "m.age": 4, "m.age.max": 5, "m.other": 6, "a": 7, "a.b": 8}
    now = {"m.now": 1, "m.now.sum": 2, "m.now.p99": 3, "m.now.age": 4, "m.now.age.max": 5, "m.other": 6}
    assert renamed({"type": "step", "number": 1, "summary": row}) == (
        {"type": "step", "number": 1, "summary": {**now, "metric": 7, "a.b": 8}}
    )


@given(st.text() | st.sampled_from(['"a":', '{"a":1}', ',"a.b":', '\\","a":"']))
def test_text_in_a_value_is_never_replaced(text: str):
    record = {"type": "end", "name": text, "attributes": {"note": text, "list": [text, text]}, "error": text}
    assert renamed(record) == record


def test_without_old_names_a_line_stays_as_it_is():
    line = '{"type":"end","name":"","attributes":{"":1}}\n'
    assert recording_format.renamer({}, {})(line) == line
