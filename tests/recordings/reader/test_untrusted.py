"""Whoever can write into a run's directory decides what is in it, but not what it does to those who look at it."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.handmade import BEGIN, Writer, ns, usual_run, usual_step, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from vgen.cli import EXPORTS, main
from vgen.profiling import semconv
from vgen.recordings.export.follow import Follower
from vgen.recordings.export.terminal import waterfall
from vgen.recordings.reader.untrusted import MOST_NESTED, clean, text

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eevil\u2066[/b]\x00\x7f\ud800\uffff"
VISIBLE = r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eevil\u2066[/b]\x00\x7f\ud800\uffff"
ACTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\uffff]")
JSONS = ("chrome", "jaeger", "otlp")


def line(record: dict[str, Any], *, raw: bool = False) -> str:
    """A record as a line. With `raw`, with no escape that JSON does not ask for."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=not raw) + "\n"


def exports(run: Path, *arguments: str) -> dict[str, str]:
    """What each exporter makes of a run. JSON is JSON, and the picture and the page can be parsed."""
    made: dict[str, str] = {}
    for form in EXPORTS:
        file = run.with_name(f"exported.{form}")
        assert main(["trace", str(run), *arguments, f"--{form}", str(file)]) == 0
        made[form] = file.read_text(encoding="utf-8")
    ElementTree.fromstring(made["svg"])
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', made["html"], re.S)
    for content in (data, *(made[form] for form in JSONS)):
        json.loads(content, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    made["html"] = data
    return made


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What a command prints, on both streams."""
    assert main(list(arguments)) == status
    said = capsys.readouterr()
    return said.out + said.err


def strings(value: Any) -> list[str]:
    """All strings in a JSON value, keys too."""
    if isinstance(value, dict):
        return [each for item in value.items() for part in item for each in strings(part)]
    return (
        [each for item in value for each in strings(item)]
        if isinstance(value, list)
        else [value] * (type(value) is str)
    )


def hostile_run(folder: Path, *, host: str = HOSTILE, pid: int = 7, raw: bool = False) -> Path:
    """A usual run in which every string that a process can choose is hostile."""
    writer = Writer(folder, pid=pid)
    file = writer.path
    bad = HOSTILE.replace("\ud800", "").replace("\x00", "") if raw else HOSTILE
    file.write_text(line({"type": "header", "format": 2, "vgen": HOSTILE, "host": host, "pid": pid, "part": 0}))
    at = usual_step(writer, 1, 0.0)
    step = writer.step(2, at, None)
    call = writer.generate(step, at, at + 2, [(at, at + 2)], spans=1, server=bad)
    writer.generate(step, at, at + 2, [(at, at + 1)], spans=1, server="other")
    sync = writer.span(semconv.WEIGHT_SYNC, at, at + 1, under=step)
    writer.span(semconv.SLEEP, at, at + 1, under=step, vgen__sleep__level=bad)
    for record in (
        writer.span("plain", at, at + 1, under=step),
        writer.span("plain", at, at + 1, under=call),
        writer.span(semconv.WEIGHT_SYNC + ".plain", at, at + 1, under=sync),
        writer.span(semconv.REQUEST, at, at + 9, under=call),
        writer.step(2, at, at + 9, error="E", trace=step["trace_id"], span_id=step["span_id"]),
    ):
        record["name"] = record["name"].replace("plain", bad)
        record["attributes"] |= {bad: bad, "list": [bad], semconv.REQUEST_ID: bad, semconv.SERVER: bad}
        record["attributes"] |= {"gen_ai.response.finish_reasons": [bad]}
        writer.line(line(record, raw=raw))
        record |= {
            "error": bad,
            "events": [{"name": bad, "unix_ns": writer.at(at), "attributes": {bad: bad, "e": [bad]}}],
        }
        record |= {"links": [{"trace_id": bad, "span_id": bad, "attributes": {bad: bad}}]}
        record["span_id"] = record["span_id"] if record["name"] == semconv.STEP else record["span_id"][::-1]
        writer.line(line(record, raw=raw))
    file.rename(folder / "vgen-\x1b[2J\u202e-7-1-0000.jsonl")
    return folder


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.fault(
    point="what a recorded run holds",
    did="Names hold escape sequences",
    happens="They are shown as visible escapes",
    within=60,
)
def test_a_recorded_string_does_nothing_to_a_terminal(tmp_path, capsys, raw):
    run = str(hostile_run(tmp_path / "run", raw=raw))
    for arguments in (["report", run], ["report", run, "--step", "2"], ["report", run, "--compare", run]):
        said = printed(capsys, *arguments)
        assert r"\x1b]0;owned" in said
        assert ACTS.findall(said) == []
    for arguments in (["trace", run], ["trace", run, "--step", "2"]):
        said = printed(capsys, *arguments)
        assert r"\x1b]0;owned" in said
        assert ACTS.findall(said) == []


@pytest.mark.parametrize("raw", [False, True])
def test_a_recorded_string_does_nothing_while_it_is_followed(tmp_path, capsys, raw):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = hostile_run(tmp_path / "run", host=socket.gethostname(), pid=gone.pid, raw=raw)
    said = printed(capsys, "trace", str(run), "--follow")
    assert r"✗ \x1b]0;owned" in said
    assert ACTS.findall(said) == []


@pytest.mark.parametrize("raw", [False, True])
def test_a_recorded_string_does_nothing_in_an_export(tmp_path, raw):
    made = exports(hostile_run(tmp_path / "run", raw=raw), "--step", "2")
    found = [*strings([json.loads(made[form]) for form in (*JSONS, "html")])]
    found += ElementTree.fromstring(made["svg"]).itertext()
    assert ACTS.findall("".join(found)) == []
    assert sum(r"\x1b]0;owned" in each for each in found) > 20


def test_what_is_printable_stays_and_what_acts_is_seen():
    assert text(HOSTILE) == VISIBLE
    harmless = "Ünïcode – 漢字 👩‍🚀 \u00a0 [b]\\x1b"
    assert text(harmless) == harmless
    assert text("a\nb\tc") == r"a\nb\tc"


NUMBERS = {
    "5,000 digits": "9" * 5000,
    "4,000 digits": "9" * 4000,
    "beyond 64 bits": str(1 << 64),
    "beyond a float": "-" + "9" * 400,
    "NaN": "NaN",
    "infinite": "1e999",
    "large": "1e308",
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.fault(
    point="what a recorded run holds",
    did="An integer has thousands of digits",
    happens="It is shown as text",
    within=60,
)
def test_a_number_of_any_size_is_shown(tmp_path, capsys, number):
    """In the attributes of spans, of requests and of events, in links, and in values."""
    run = tmp_path / "run"
    writer = Writer(run)
    step = writer.step(1, 0, 10)
    call = writer.generate(step, 0, 4, [(0, 3), (0, 4)], spans=2)
    keys = (semconv.SYNC_BYTES, semconv.PAUSED_SECONDS, semconv.QUEUE_SECONDS, semconv.OUTPUT_TOKENS)
    keys += (semconv.PREEMPTIONS, semconv.PROMPT_INDEX, semconv.GATHER_SECONDS, semconv.DEVICE_BYTES)
    for name in (semconv.WEIGHT_SYNC, semconv.SYNC_LOAD, semconv.REQUEST, semconv.SLEEP, semconv.WAKE_UP, "mine"):
        record = writer.span(name, 4, 8, under=call if name == semconv.REQUEST else step)
        record["attributes"] |= dict.fromkeys(keys, "@")
        record |= {"events": [{"name": "e", "unix_ns": "@", "attributes": {"n": "@"}}], "span_id": f"{len(name):016x}"}
        record |= {"links": [{"trace_id": "@", "span_id": "@", "attributes": {"n": "@"}}]}
        writer.line(line(record).replace('"@"', number))
    for instrument in (semconv.REQUEST_E2E, semconv.GENERATED_TOKENS, semconv.DROPPED, semconv.REQUEST_START):
        for _ in range(2):
            writer.measure(instrument, ["@"] * 2, under=call)
            content = writer.path.read_text().replace('"@"', number)
            writer.path.write_text(content)
    made = exports(run)
    assert all("mine" in content for content in made.values())
    for arguments in (["report", str(run)], ["report", str(run), "--step", "1"], ["trace", str(run)]):
        # a value that no float holds makes the measurement a damaged one, and those alone
        assert set(re.findall(r"(\d+) lines? cut", words(printed(capsys, *arguments)))) <= {"8"}
    json.loads(
        printed(capsys, "report", str(run), "--json").partition("\n")[0],
        parse_constant=lambda constant: pytest.fail(constant),
    )


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (semconv.REQUEST, semconv.PREEMPTIONS, "many"),
        (semconv.REQUEST, semconv.SERVER, ["a"]),
        (semconv.REQUEST, semconv.QUEUE_SECONDS, {"a": 1}),
        (semconv.SLEEP, semconv.SLEEP_LEVEL, "[/b]"),
        (semconv.WEIGHT_SYNC, semconv.SYNC_BYTES, [1]),
        (semconv.STEP, semconv.STEP_NUMBER, [1]),
        (semconv.STEP, semconv.RANK, "one"),
    ],
)
def test_an_attribute_of_a_wrong_type_is_none_that_is_known(tmp_path, capsys, name, key, value):
    usual_run(tmp_path / "run")
    writer = Writer(tmp_path / "run", pid=2)
    step = writer.step(9, 0, 100)
    call = writer.generate(step, 0, 90, [(0, 1)] * 9 + [(0, 90)])
    record = writer.span(name, 0, 90, under=call if name == semconv.REQUEST else step)
    record["attributes"][key] = value
    writer.line(record)
    for arguments in (["report"], ["report", "--step", "9"], ["report", "--step", "9", "--json"], ["trace"]):
        printed(capsys, arguments[0], str(tmp_path / "run"), *arguments[1:])
    exports(tmp_path / "run", "--step", "9")


def nested(levels: int) -> Any:
    value: Any = "deepest"
    for level in range(levels):
        value = [value] if level % 2 else {"in": value}
    return value


@pytest.mark.parametrize("levels", [5, 200, 900])
def test_what_is_nested_deeply_becomes_text(tmp_path, capsys, levels):
    run = tmp_path / "run"
    writer = Writer(run)
    step = writer.step(1, 0, 10)
    record = writer.span("mine", 1, 2, under=step)
    deep = "[" * levels + "]" * levels
    record["attributes"]["deep"] = "@"
    record |= {"events": [{"name": "e", "unix_ns": BEGIN, "attributes": {"deep": "@"}}]}
    record |= {"links": [{"trace_id": "1", "span_id": "1", "attributes": {"deep": "@"}}]}
    writer.line(line(record).replace('"@"', deep))
    made = exports(run)
    assert "<list>" in made["chrome"]
    assert "[[[[[" not in "".join(made.values())
    printed(capsys, "report", str(run))
    printed(capsys, "trace", str(run))


@pytest.mark.fault(
    point="what a recorded run holds",
    did="A line is nested thousands of levels deep",
    happens="It counts as damaged",
    within=60,
)
def test_a_line_that_is_nested_too_deeply_to_be_parsed_is_damaged(tmp_path, capsys):
    usual_run(tmp_path / "run")
    (file,) = (tmp_path / "run").glob("*.jsonl")
    deep = '{"type":"end","name":"a","attributes":{"deep":' + "[" * 100_000 + "]" * 100_000 + "}}\n"
    with file.open("a") as content:
        content.write(deep)
    for command in ("report", "trace"):
        assert "1 line cut off or damaged" in words(printed(capsys, command, str(tmp_path / "run")))


def test_lists_in_the_attributes_of_an_event_become_text(tmp_path):
    run = tmp_path / "run"
    writer = Writer(run)
    record = writer.step(1, 0, 10)
    attributes = {"list": ["a", 1, None], "dict": {"b": [True]}, "number": 1}
    writer.line(line({**record, "events": [{"name": "e", "unix_ns": BEGIN + ns(1), "attributes": attributes}]}))
    made = exports(run)
    as_text = {"list": '["a", 1, null]', "dict": '{"b": [true]}', "number": 1}
    assert [event["args"] for event in json.loads(made["chrome"])["traceEvents"] if event["ph"] == "i"] == [as_text]
    assert as_text in [event[2] for row in json.loads(made["html"])["spans"] for event in row[-1].get("events", ())]


WRONG: dict[str, list[Any]] = {
    "name": [None, 1, ["a"]],
    "trace_id": [None, 1, "", "xyz", "1" * 33],
    "span_id": [None, 1, "", "-1", "no hex", "1" * 17],
    "parent_id": [1, ["a"], "no hex", "1" * 17],
    "start_unix_ns": [None, "1", 1.5, float("nan"), float("inf"), 1 << 63, -(1 << 64), BEGIN + ns(3), True],
    "end_unix_ns": [None, "1", 1e300, float("-inf"), 1 << 63, 10**400, BEGIN, [1]],
    "attributes": [None, [], "a"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_record_with_an_impossible_field_is_skipped_and_counted(tmp_path, capsys, key, value):
    run = tmp_path / "run"
    usual_run(run, steps=2)
    (file,) = run.glob("*.jsonl")
    record = {"type": "end", "name": "wrong", "trace_id": "1" * 32, "span_id": "1" * 16, "parent_id": None}
    record |= {"start_unix_ns": BEGIN + ns(1), "end_unix_ns": BEGIN + ns(2), "attributes": {}, key: value}
    with file.open("a") as content:
        content.write(line(record))
    for command in ("report", "trace"):
        said = words(printed(capsys, command, str(run)))
        assert "1 line cut off or damaged" in said
        assert "wrong" not in said


def test_a_header_with_impossible_fields_is_damaged(tmp_path, capsys):
    usual_run(tmp_path / "run")
    (file,) = (tmp_path / "run").glob("*.jsonl")
    kept = file.read_text()
    for fields in (
        '"part":1e999',
        '"format":1e999',
        '"format":[]',
        '"part":' + "9" * 5000 + ',"format":2',
        '"deep":' + "[" * 9999,
    ):
        file.write_text(f'{{"type":"header",{fields}}}\n{kept}')
        for command in ("report", "trace"):
            printed(capsys, command, str(tmp_path / "run"))


def test_spans_that_are_each_others_parents_are_shown(tmp_path, capsys):
    run = tmp_path / "run"
    writer = Writer(run)
    for name, own, parent in (("itself", "1", "1"), ("one", "2", "3"), ("other", "3", "2")):
        ids = {"trace_id": "1" * 32, "span_id": own * 16, "parent_id": parent * 16}
        times = {"start_unix_ns": BEGIN, "end_unix_ns": BEGIN + ns(1)}
        writer.line(line({"type": "end", "name": name, **ids, **times, "attributes": {}}))
    said = words(printed(capsys, "trace", str(run)))
    assert all(name in said for name in ("itself", "one", "other"))
    assert all(name in content for name in ("itself", "one", "other") for content in exports(run).values())
    printed(capsys, "report", str(run))


def test_markup_in_a_name_is_no_markup(tmp_path, capsys):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10)
    sync = writer.span(semconv.WEIGHT_SYNC, 1, 5, under=step)
    writer.span(semconv.WEIGHT_SYNC + ".[/red]", 1, 2, under=sync)
    assert "[/red]" in printed(capsys, "report", str(tmp_path))


@pytest.mark.parametrize("damage", ["[" * 100_000, '{"steps":1e999}', '{"spans":' + "9" * 5000 + "}", "{}", "NaN"])
def test_a_file_to_compare_with_may_hold_anything(tmp_path, capsys, damage):
    usual_run(tmp_path / "run")
    other = tmp_path / "other.json"
    other.write_text(damage)
    assert main(["report", str(tmp_path / "run"), "--compare", str(other)]) == 1
    assert "is not what `vgen report --json` prints" in words(capsys.readouterr().err)


def test_a_name_in_a_file_to_compare_with_does_nothing(tmp_path, capsys):
    usual_run(tmp_path / "run")
    figures = json.loads(printed(capsys, "report", str(tmp_path / "run"), "--json"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(figures).replace('"update"', json.dumps(HOSTILE)))
    said = printed(capsys, "report", str(tmp_path / "run"), "--compare", str(other), status=3)
    assert r"step: \x1b]0;owned" in said
    assert ACTS.findall(said) == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.fault(
    point="what a recorded run holds",
    did="The terminal knows ASCII alone",
    happens="`?` stands for other characters",
    within=60,
)
def test_a_terminal_without_the_characters_shows_others(tmp_path, encoding):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10, error="Fehler–漢字")
    writer.generate(step, 0, 4, [(0, 3), (0, 4)], spans=2, server="ü漢")
    for command in ("trace", "report"):
        arguments = [sys.executable, "-m", "vgen.cli", command, str(tmp_path)]
        shown = subprocess.run(arguments, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert (shown.returncode, shown.stderr) == (0, b""), shown.stderr.decode()
        assert b"Fehler?" in shown.stdout
    assert ("ü" if encoding == "latin-1" else "?") + "?" in shown.stdout.decode(encoding)


# Any damage ----------------------------------------------------------------------------------------------------------

nasty = st.sampled_from(
    [HOSTILE, "[/b]", "NaN", float("nan"), 10**400, 1e308, BEGIN, 1 << 63, None, nested(60), [HOSTILE], {HOSTILE: 1}]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("name", "trace_id", "span_id", "parent_id", "start_unix_ns", "end_unix_ns", "attributes", "values", "unix_ns")
KEYS += ("error", "events", "links", "current", "type", "host", "pid", "part", "format", "vgen")


def containers(value: Any) -> list[Any]:
    """Every dict and list in a JSON value."""
    if not isinstance(value, dict | list):
        return []
    return [value] + [
        each for item in (value.values() if isinstance(value, dict) else value) for each in containers(item)
    ]


@settings(derandomize=True, max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.fault(
    point="what a recorded run holds",
    did="Records are changed at random",
    happens="Every command ends without a traceback",
    within=60,
)
def test_no_changed_record_makes_a_stack_trace(tmp_path, capsys, data):
    """Values anywhere in the records of a run replaced, added and taken away; also records twice, and text cut."""
    kept, run = tmp_path / "kept", tmp_path / "run"
    if not kept.exists():
        writer = Writer(kept)
        at = usual_step(writer, 1, 0.0)
        step = writer.step(2, at, at + 3, error="E")
        record = writer.span("mine", at, at + 1, under=step)
        record["events"] = [{"name": "e", "unix_ns": BEGIN, "attributes": {"a": ["b"]}}]
        writer.line({**record, "links": [{"trace_id": "1", "span_id": "2", "attributes": {}}]})
        writer.span(semconv.WEIGHT_SYNC, at, None, under=step)
        run.mkdir()
    (file,) = kept.glob("*.jsonl")
    records = [json.loads(each) for each in file.read_text().splitlines()]
    for _ in range(data.draw(st.integers(1, 12))):
        number = data.draw(st.integers(0, len(records) - 1))
        record = records[number] = copy.deepcopy(records[number])
        part = data.draw(st.sampled_from(containers(record)))
        if isinstance(part, dict):
            key = data.draw(st.sampled_from([*sorted(part), *KEYS, HOSTILE]) | st.text(max_size=5))
            part[key] = data.draw(nasty | anything)
        else:
            part[:] = data.draw(st.lists(nasty | anything, max_size=3))
        if data.draw(st.booleans()):
            records.append(records[number])
    lines = [line(each, raw=False) for each in records]
    (run / file.name).write_text("".join(lines))
    for arguments in (
        ["report", str(run)],
        ["report", str(run), "--step", "2"],
        ["report", str(run), "--json"],
        ["report", str(run), "--compare", str(kept)],
        ["trace", str(run)],
        ["trace", str(run), "--step", "2"],
    ):
        assert main(arguments) in (0, 1, 3)
        said = capsys.readouterr()
        assert ACTS.findall(said.out + said.err) == []
    for form in EXPORTS:
        out = tmp_path / f"out.{form}"
        if main(["trace", str(run), f"--{form}", str(out)]) == 0:
            if form in JSONS:
                json.loads(out.read_text(encoding="utf-8"), parse_constant=lambda constant: pytest.fail(constant))
            elif form == "svg":
                ElementTree.fromstring(out.read_text(encoding="utf-8"))
    capsys.readouterr()
    followed = list(Follower(run).poll())
    if followed:
        console = Console(file=io.StringIO(), width=100)
        console.print(waterfall(followed))
        assert ACTS.findall(console.file.getvalue()) == []  # type: ignore[attr-defined]


def test_lists_and_dicts_are_kept_to_the_promised_depth_and_no_deeper():
    deep: Any = "kept"
    for _ in range(MOST_NESTED):
        deep = [deep]
    record = {"attributes": {"a": deep, "b": [deep], "c": {"k": deep}}, "odd": math.nan}
    cleaned = clean(record)["attributes"]
    assert cleaned["a"] == deep
    assert cleaned["b"] == [[["<list>"]]]
    assert cleaned["c"] == {"k": [["<list>"]]}
