"""The record on disk: every line valid, every file whole, no record twice."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
from helpers.files import lines, of_type, read_whole
from helpers.recorded_run import read_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vgen.profiling import Instrument, ProfilingContext
from vgen.profiling.sinks import jsonl
from vgen.profiling.sinks.jsonl import JsonlSink

COUNTER = Instrument("tokens", "counter", "{token}")


def test_what_was_recorded_is_read_back_as_a_whole(tmp_path: Path):
    random.seed(0)
    with ProfilingContext([JsonlSink(tmp_path)], {"vgen.rank": 1}) as profiling:
        for number in range(3):
            random.seed(0)
            with profiling.step(number), profiling.span("outer", a=1) as outer:
                outer.event("half", b=2)
                with profiling.span("inner"):
                    profiling.record(COUNTER, 5, c=3)
                profiling.rebuilt("request", outer.start_ns, outer.start_ns + 10)
    run = read_whole(tmp_path)
    assert Counter(span.name for span in run.spans) == dict.fromkeys(("inner", "outer", "request", "train.step"), 3)
    assert len(run.traces()) == 3
    outer_read = next(span for span in run.spans if span.name == "outer")
    assert outer_read.attributes == {"vgen.rank": 1, "vgen.step": 0, "a": 1}
    assert [(e["name"], e["attributes"]) for e in outer_read.events] == [("half", {"b": 2})]
    assert [span.rebuilt for span in run.spans if span.name == "request"] == [True] * 3
    steps = [span for span in run.spans if span.name == "train.step"]
    assert [link["span_id"] for link in steps[1].links] == [steps[0].span_id]
    assert [number for number, _ in run.rows] == [0, 1, 2]
    assert run.rows[2][1]["tokens"] == 5
    [first, *_] = run.measurements
    assert (first["name"], first["kind"], first["unit"], first["values"]) == ("tokens", "counter", "{token}", [5])
    assert first["attributes"] == {"vgen.rank": 1, "vgen.step": 0, "a": 1, "c": 3}


def test_each_file_begins_with_who_wrote_it(tmp_path: Path):
    sink = JsonlSink(tmp_path)
    [header] = lines(sink.path)
    assert (header["format"], header["pid"], header["part"]) == (2, os.getpid(), 0)
    sink.close(1)


def test_an_open_span_is_on_disk_before_it_ends_and_a_short_one_only_once(tmp_path: Path):
    with ProfilingContext([JsonlSink(tmp_path)]) as profiling, profiling.span("long", a=1) as long:
        long.set(b=2)
        for _ in range(5):
            with profiling.span("short"):
                pass
        profiling.flush()
        [line] = of_type(tmp_path, "start")
        assert (line["name"], line["attributes"], line["span_id"]) == ("long", {"a": 1}, long.span_id)
        [unended] = [span for span in read_run(tmp_path).spans if span.end_ns is None]
        assert unended.name == "long"
    assert len(of_type(tmp_path, "start")) == 1
    run = read_whole(tmp_path)
    assert [span.attributes for span in run.spans if span.name == "long"] == [{"a": 1, "b": 2}]


def test_the_error_is_its_type(tmp_path: Path):
    profiling = ProfilingContext([JsonlSink(tmp_path)])
    with pytest.raises(ValueError, match="secret"), profiling, profiling.span("x"):
        raise ValueError("secret")
    [span] = read_whole(tmp_path).spans
    assert span.error == "ValueError"
    assert "secret" not in "".join(file.read_text() for file in tmp_path.iterdir())


# Values ------------------------------------------------------------------------------------------------------------

texts = st.text() | st.sampled_from(["\ud800", "\x1e", "}\x1e{", "\n", "}\n{", '"', "\\", "\u2028", "NaN", "\0"])
scalars = st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats() | texts
attributes = st.dictionaries(texts, scalars | st.lists(scalars, max_size=3), max_size=4)


def spoken(value: object) -> object:
    """What JSON says for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return [spoken(item) for item in value] if isinstance(value, list) else value


@given(st.lists(st.tuples(texts, attributes), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_attributes_are_they_come_back(tmp_path: Path, recorded: list[tuple[str, dict[str, object]]]):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    with ProfilingContext([JsonlSink(folder)]) as profiling:
        for name, own in recorded:
            with profiling.span(name, own) as span:
                span.event(name, own).link(span, **{"k": 1})
    ends = of_type(folder, "end")
    assert [end["name"] for end in ends] == [spoken(name) for name, _ in recorded]
    for end, (_, own) in zip(ends, recorded, strict=True):
        expected = {spoken(key): spoken(value) for key, value in own.items() if value is not None}
        assert end["attributes"] == expected
        assert end["events"][0]["attributes"] == expected


def test_values_that_json_or_python_refuse(tmp_path: Path):
    with ProfilingContext([JsonlSink(tmp_path)]) as profiling:
        with profiling.span("x", huge=10**5000, large=2**100, text="x" * 1_000_000, nan=math.nan):
            profiling.record_many(COUNTER, [1.0, math.nan, math.inf, 10**400])
        with profiling.step(1):
            profiling.record(Instrument("g", "gauge"), -math.inf)
    [x, _] = of_type(tmp_path, "end")
    assert x["attributes"]["large"] == 2**100
    assert (len(x["attributes"]["text"]), x["attributes"]["nan"]) == (1_000_000, "NaN")
    assert x["attributes"]["huge"].startswith("<int of ")
    first, second = of_type(tmp_path, "measurement")
    assert (first["values"], second["values"]) == ([1.0, "NaN", "Infinity", "Infinity"], ["-Infinity"])
    assert of_type(tmp_path, "step")[0]["summary"]["g"] == "-Infinity"
    assert profiling.dropped() == {}


# Files -------------------------------------------------------------------------------------------------------------


def test_a_full_file_is_followed_by_the_next_part_and_the_oldest_go(tmp_path: Path):
    with ProfilingContext([JsonlSink(tmp_path, max_bytes=2000, max_parts=3)]) as profiling:
        for number in range(100):
            with profiling.span("x", n=number):
                pass
            if number % 5 == 4:
                profiling.flush()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    assert all(file.stat().st_size < 2000 + 5 * 400 for file in files)
    headers = [lines(file)[0] for file in files]
    assert [header["part"] for header in headers] == [headers[0]["part"] + n for n in range(3)]
    numbers = [end["attributes"]["n"] for end in of_type(tmp_path, "end")]
    assert numbers == list(range(100 - len(numbers), 100)), "the newest remain, without a gap"


def test_each_part_says_by_itself_what_is_open(tmp_path: Path):
    """A span that stays open for days is known though the file that it began in is gone."""
    profiling = ProfilingContext([JsonlSink(tmp_path, max_bytes=1000, max_parts=2)])
    with profiling, profiling.span("train", a=1) as train:
        for number in range(20):
            with profiling.span("x", n=number):
                pass
            profiling.flush()
        assert lines(min(tmp_path.iterdir()))[0]["part"] > 2
        [unended] = [span for span in read_whole(tmp_path).spans if span.end_ns is None]
        assert (unended.span_id, unended.attributes) == (train.span_id, {"a": 1})
    assert [span.end_ns for span in read_whole(tmp_path).spans if span.name == "train"] == [train.end_unix_ns]


def test_two_sinks_in_one_folder_write_two_files(tmp_path: Path):
    contexts = [ProfilingContext([JsonlSink(tmp_path)], {"n": n}) for n in range(2)]
    for profiling in contexts:
        with profiling.span("x"):
            pass
    for profiling in contexts:
        profiling.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert sorted(span.attributes["n"] for span in read_whole(tmp_path).spans) == [0, 1]


def test_a_restarted_process_with_the_same_number_leaves_the_older_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a container the trainer is process 1 every time; and a clock may be set back."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(jsonl.time, "time_ns", lambda: 1_700_000_000_000_000_000)
    contents: dict[Path, bytes] = {}
    for life in range(3):
        sink = JsonlSink(tmp_path)
        with ProfilingContext([sink]) as profiling, profiling.span("x", life=life):
            pass
        contents[sink.path] = sink.path.read_bytes()
    assert len(contents) == 3
    assert all(path.read_bytes() == content for path, content in contents.items())
    assert sorted(span.attributes["life"] for span in read_whole(tmp_path).spans) == [0, 1, 2]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        JsonlSink(tmp_path / "file" / "runs")


def test_threads_lines_do_not_mix(tmp_path: Path):
    with ProfilingContext([JsonlSink(tmp_path)]) as profiling:

        def work(thread: int) -> None:
            for n in range(300):
                with profiling.span("outer", thread=thread), profiling.span("x", n=n):
                    profiling.record(COUNTER, n)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    run = read_whole(tmp_path)
    assert len(run.spans) == 2400
    assert len(run.measurements) == 1200


def test_the_file_grows_by_whole_lines_only(tmp_path: Path):
    """Who follows it never reads half a record, whatever it weighs."""
    sink = JsonlSink(tmp_path)
    with ProfilingContext([sink]) as profiling:
        for _ in range(20):
            with profiling.span("x", text="y" * 100_000):
                pass
            profiling.flush()
            assert json.loads(sink.path.read_text().rsplit("\n", 2)[-2])["type"] == "end"


def test_a_files_name_says_which_process_of_which_host_wrote_it(tmp_path):
    sink = JsonlSink(tmp_path)
    with ProfilingContext([sink]) as profiling, profiling.span("x"):
        pass
    (file,) = tmp_path.iterdir()
    assert file == sink.path
    assert file.name.startswith(f"vgen-{socket.gethostname()}-{os.getpid()}-")
