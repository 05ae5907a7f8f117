"""The format of a recorded run: the version, the file names, the keys, the line writer and the line reader.

A run is a directory. Each process writes its own files, `vgen-<host>-<pid>-<start>-<part>.jsonl`, and only appends
to them. A file is a sequence of JSON objects, one on each line. The key `type` says what a line is:

| `type` | meaning | keys besides `type` |
|---|---|---|
| `header` | the first line of every file: which process wrote it | `format`, `vgen` (version), `host`, `pid`, `part`, `unix_ns` |
| `start` | a span that was open when the sink wrote to the file | `name`, `trace_id`, `span_id`, `parent_id`, `start_unix_ns`, `attributes` |
| `end` | a whole span, so a reader does not need its `start` line | the same, `end_unix_ns`; if there are any: `error`, `events`, `links`; `current: false` for a span that was rebuilt after the fact |
| `measurement` | values of one instrument | `name`, `kind`, `unit`, `values`, `unix_ns`, `trace_id`, `span_id`, `attributes` |
| `step` | the summary row of one training step | `number`, `trace_id`, `span_id`, `summary` |

Times are Unix nanoseconds. Within a trace, their differences are monotonic durations. NaN and the infinities are
the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, because JSON has no numbers for them.
"""  # noqa: E501

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .. import __version__
from . import semconv
from .span_model import Attributes, Measurement, Span, Step

FORMAT = 2
"""The version that this code writes. It reads version 1 too: the keys are the same, but some attributes and metrics
had other names (`semconv.RENAMED_ATTRIBUTES`, `semconv.RENAMED_METRICS`)."""

HEADER_START = '{"type":"header"'
_LINE_START = '{"type":"'
_SPAN_STARTS = ('{"type":"end"', '{"type":"start"')
_STEP_START = '{"type":"step"'

SpanHead: TypeAlias = "tuple[str, str, str, str | None, int, int | None, int | None]"
"""Name, trace ID, span ID, parent ID, start and end in Unix nanoseconds (end is None for a `start` line), and the step
number. A plain tuple: a named one would cost 2 % of the time of `vgen report`."""

# Files ---------------------------------------------------------------------------------------------------------------


def file_name(host: str, pid: int, start_ns: int, part: int) -> str:
    """The name of a file. Sorted by name, the parts of one process follow each other."""
    return f"vgen-{host}-{pid}-{start_ns}-{part:04d}.jsonl"


def files(place: str | Path) -> list[Path]:
    """The files of the run in the directory `place` and below it, sorted by path; or `place` itself if it is a file."""
    path = Path(place)
    return [path] if path.is_file() else sorted(file for file in path.glob("**/*.jsonl") if file.is_file())


def process_key(file: Path) -> str:
    """The part of a file's name that all files of one process share."""
    return file.stem.rpartition("-")[0] or file.stem


# Writing -------------------------------------------------------------------------------------------------------------

_strict: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "check_circular": False}
_encode = json.JSONEncoder(separators=(",", ":"), **_strict).encode
_encode_marked = json.JSONEncoder(separators=("\x1e", ":"), **_strict).encode


@dataclass(frozen=True, slots=True)
class Header:
    """What the first line of a file says about the process that wrote it."""

    host: str
    pid: int | None
    part: int
    """Which of the process's files this is, from 0."""
    format: int = FORMAT
    vgen: str = __version__


def header_line(header: Header) -> str:
    """The first line of a file."""
    keys = {"format": header.format, "vgen": header.vgen, "host": header.host, "pid": header.pid, "part": header.part}
    return _line({"type": "header", **keys, "unix_ns": time.time_ns()})


def start_line(span: Span, attributes: Attributes) -> str:
    """The line of an open span. `attributes` are those that it was opened with."""
    return f'{{"type":"start",{_span_keys(span)},"attributes":{_text(attributes)}}}\n'


def end_lines(spans: list[Span]) -> list[str]:
    """The lines of spans that have ended."""
    return [
        f'{{"type":"end",{_span_keys(span)},"end_unix_ns":{span.end_ns + span.offset_ns},"attributes":{attributes}'  # type: ignore[operator]
        f"{_rare_keys(span) if span.links or span.events or span.error is not None or not span.current else ''}}}\n"
        for span, attributes in zip(spans, _texts([span.attributes for span in spans]), strict=True)
    ]


def measurement_line(measurement: Measurement) -> str:
    """The line of one instrument's values."""
    instrument = measurement.instrument
    keys = {"name": instrument.name, "kind": instrument.kind, "unit": instrument.unit, "values": measurement.values}
    ids = {"unix_ns": measurement.unix_ns, "trace_id": measurement.trace_id, "span_id": measurement.span_id}
    return _line({"type": "measurement", **keys, **ids, "attributes": measurement.attributes})


def step_line(step: Step) -> str:
    """The line of a step that has ended, with its summary row."""
    ids = {"trace_id": step.trace_id, "span_id": step.span_id}
    return _line({"type": "step", "number": step.number, **ids, "summary": step.summary()})


def _span_keys(span: Span) -> str:
    parent = "null" if span.parent_id is None else f'"{span.parent_id}"'
    return (
        f'"name":{_text(span.name)},"trace_id":"{span.trace_id}","span_id":"{span.span_id}","parent_id":{parent},'
        f'"start_unix_ns":{span.start_ns + span.offset_ns}'
    )


def _rare_keys(span: Span) -> str:
    """The keys that most spans do not have."""
    keys: dict[str, Any] = {} if span.current else {"current": False}
    if span.error is not None:
        keys["error"] = span.error
    if span.events:
        keys["events"] = [
            {"name": e.name, "unix_ns": e.time_ns + span.offset_ns, "attributes": e.attributes} for e in span.events
        ]
    if span.links:
        keys["links"] = [{"trace_id": k.trace_id, "span_id": k.span_id, "attributes": k.attributes} for k in span.links]
    return "," + _text(keys)[1:-1]


def _texts(dicts: list[dict[str, Any]]) -> list[str]:
    """Each dict as JSON. A call of the encoder costs more than three small dicts, so it gets all of them."""
    try:
        # JSON escapes control characters in strings, and no dict contains another, so the marks are unambiguous.
        marked = _encode_marked(dicts)[1:-1].replace("}\x1e{", "}\n{").replace("\x1e", ",")
    except (ValueError, TypeError):
        return [_text(attributes) for attributes in dicts]
    return marked.split("\n") if dicts else []


def _line(record: dict[str, Any]) -> str:
    return _text(record) + "\n"


def _text(value: Any) -> str:
    try:
        return _encode(value)
    except (ValueError, TypeError):
        return _encode(_encodable(value))


def _encodable(value: Any) -> Any:
    """`value` with everything that the JSON encoder refuses replaced by a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"<int of {value.bit_length()} bits>"  # Python refuses to print an integer of more than 4300 digits
    if isinstance(value, dict):
        return {str(key): _encodable(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value if value is None or isinstance(value, str | int | float) else f"<{type(value).__name__}>"


# Reading -------------------------------------------------------------------------------------------------------------

_STEP_NUMBER = rf'"{re.escape(semconv.STEP_NUMBER)}":(-?\d{{1,18}})[,}}]'
_HEX16 = '"([0-9a-f]{16})"'
_match_head = re.compile(
    rf'\{{"type":"(?:end|start)","name":"([^"\\]*)","trace_id":"([0-9a-f]{{32}})","span_id":{_HEX16},'
    rf'"parent_id":(?:null|{_HEX16}),"start_unix_ns":([1-8]\d{{18}}),(?:"end_unix_ns":([1-8]\d{{18}}),)?'
    rf'"attributes":\{{(?:{_STEP_NUMBER})?'
).match
_match_ids = re.compile("[0-9a-fA-F]{1,32}:[0-9a-fA-F]{1,16}:[0-9a-fA-F]{0,16}").fullmatch
_search_step = re.compile(rf"[{{,]{_STEP_NUMBER}").search
_search_rank = re.compile(rf'"{re.escape(semconv.RANK)}":(\d{{1,9}})[,}}]').search


def parse_header(line: str) -> Header:
    """The header on a line. Raises ValueError for anything else."""
    try:
        keys = _loads(line)
        pid = keys.get("pid")
        return Header(
            str(keys.get("host", "")),
            pid if type(pid) is int and 0 <= pid < 1 << 31 else None,
            int(keys.get("part", 0)),
            int(keys["format"]),
            str(keys.get("vgen", "")),
        )
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError("not a header") from error


_START: dict[str, type] = {"name": str, "trace_id": str, "span_id": str, "start_unix_ns": int, "attributes": dict}
_TYPES: dict[str, dict[str, type]] = {
    "start": _START,
    "end": {**_START, "end_unix_ns": int},
    "measurement": {"name": str, "values": list, "attributes": dict},
    "step": {"number": int, "summary": dict},
}
"""The types of the keys that a record must have."""


def parse(line: str) -> dict[str, Any]:
    """The record on a line, with the keys of the table above.

    Names, IDs, times, values and attributes of the types in the table have the right type. The IDs of spans are
    hexadecimal, their times are of 64 bits, and none ends before it starts. A record of an unknown type is returned
    unchecked, for files of a newer version. Raises ValueError for a line that is damaged.
    """
    try:
        record = _loads(line)
        expected = _TYPES.get(record["type"], {"type": str})
        valid = all([type(record[key]) is kind for key, kind in expected.items()])
        valid = valid and isinstance(record.get("parent_id"), str | None)
        valid = valid and (expected.get("start_unix_ns") is None or _is_possible(record))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a record") from error
    if not valid:
        raise ValueError("not a record")
    return record


def _is_possible(span: dict[str, Any]) -> bool:
    """Whether the IDs and the times of a span can be what the writer wrote."""
    start = span["start_unix_ns"]
    end = span["end_unix_ns"] if span["type"] == "end" else start
    ids = f"{span['trace_id']}:{span['span_id']}:{span.get('parent_id') or ''}"
    return -(1 << 63) < start <= end < 1 << 63 and _match_ids(ids) is not None


def _loads(line: str) -> Any:
    """The JSON value on a line. An integer of more digits than Python converts becomes text."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(line, parse_int=_int_or_text)


def _int_or_text(digits: str) -> int | str:
    return int(digits) if len(digits) <= 600 else f"<int of {len(digits)} digits>"


def span_head(line: str) -> SpanHead | None:
    """The first keys of a span, read without parsing the line: that takes a fifth of the time.

    None for a line that is not a span, or that the writer above did not write in this form: use `parse` for that one.
    """
    match = _match_head(line)
    if match is None or not line.endswith("}\n"):
        return None
    name, trace_id, span_id, parent_id, start, end, step = match.groups()
    # `parse` says what is wrong with a span that ends before it starts: as text, because both times have 19 digits. And
    # only a reader that parses a record makes an unprintable name safe.
    if (end is not None and end < start) or not name.isprintable():
        return None
    if step is None and semconv.STEP_NUMBER in line and (later := _search_step(line)) is not None:
        step = later[1]
    end, step = None if end is None else int(end), None if step is None else int(step)
    return name, trace_id, span_id, parent_id, int(start), end, step


def may_be_span(line: str) -> bool:
    """False for a line that the writer above wrote and that is not a span: a reader of spans need not parse it."""
    return line.startswith(_SPAN_STARTS) or not line.startswith(_LINE_START)


def rank_in(line: str) -> int | None:
    """The rank among the attributes of a line, read without parsing it."""
    match = _search_rank(line)
    return int(match[1]) if match is not None else None


def renamer(attributes: Mapping[str, str], metrics: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces the old names of attributes and metrics in a line by new ones.

    It works on the text: inside a JSON string every quotation mark is escaped, so `"name":` can only be a key.
    """

    def pattern(text: str, names: Mapping[str, str]) -> re.Pattern[str]:
        # Longest first, because one name may be the beginning of another. `(?!)` never matches.
        choice = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
        return re.compile(text.replace("NAME", f"(?P<name>{choice})"))

    attribute = pattern(r'(?<=[{,\s]")NAME(?="\s*:)', attributes)
    summed = pattern(r'(?<=[{,\s]")NAME(?=(?:\.(?:count|sum|min|max|p\d+))?"\s*:)', metrics)
    measured = pattern(r'^(?P<head>\{"type":\s*"measurement",\s*"name":\s*")NAME(?=")', metrics)

    def rename(line: str) -> str:
        if line.startswith(_STEP_START):
            return summed.sub(lambda match: metrics[match["name"]], line)
        line = measured.sub(lambda match: match["head"] + metrics[match["name"]], line)
        return attribute.sub(lambda match: attributes[match["name"]], line)

    return rename


with_new_names = renamer(semconv.RENAMED_ATTRIBUTES, semconv.RENAMED_METRICS)
"""A line of a file of format 1 with the names of format 2."""
