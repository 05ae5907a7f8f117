"""The record on disk: append-only files of JSON lines, each process its own.

Each line is an object with a `type`:

- `header`: the first of every file. `format` (1), vgen's version, `host`, `pid`, `part`, `unix_ns`.
- `start`: a span was open when lines were written, or when the file was begun: with what it was opened.
- `end`: the whole span, so that a reader needs no start line. A `current` of false marks one rebuilt afterwards.
- `measurement`: values of one instrument.
- `step`: a step's number and its closed row.

Times are Unix nanoseconds; within a trace their differences are monotonic. NaN and infinities are the
strings `"NaN"`, `"Infinity"`, `"-Infinity"`, because JSON has no numbers for them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from ... import __version__
from .. import names
from ..records import Attributes, Measurement, Sink, Span, Step

logger = logging.getLogger("vgen.telemetry")

FORMAT = 1

_strict: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "check_circular": False}
_encode = json.JSONEncoder(separators=(",", ":"), **_strict).encode
_encode_marked = json.JSONEncoder(separators=("\x1e", ":"), **_strict).encode


class JsonlSink(Sink):
    """Writes `<directory>/vgen-<host>-<pid>-<start>-<part>.jsonl`, never into a file that is there already.

    Lines reach the file every 50 ms: what a Python exception or an exit leaves behind is complete, a
    SIGKILL loses at most the last 200 ms. A file that reaches `max_bytes` is followed by the next part;
    of more than `max_parts` the oldest is deleted. What cannot be written (the disk is full) is counted
    in `lost` and warned of once, and a directory that was deleted is made again. A directory that cannot
    be written raises `OSError` here, at construction.
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_bytes: int = 64 << 20, max_parts: int = 16) -> None:
        self.directory = Path(directory)
        self.max_bytes, self.max_parts = max_bytes, max_parts
        self._begin()
        try:
            self._put("")
        except OSError:
            self._leave()
            raise

    def on_start(self, span: Span, attributes: Attributes) -> None:
        if span.current or span.name not in names.SELECTED:
            self._new[span.span_id] = span, attributes

    def on_end(self, span: Span) -> None:
        if self._new.pop(span.span_id, None) is None:
            self._open.pop(span.span_id, None)
        self._ended.append(span)

    def on_measurement(self, measurement: Measurement) -> None:
        instrument = measurement.instrument
        record = {
            "type": "measurement",
            "name": instrument.name,
            "kind": instrument.kind,
            "unit": instrument.unit,
            "values": measurement.values,
            "unix_ns": measurement.unix_ns,
            "trace_id": measurement.trace_id,
            "span_id": measurement.span_id,
            "attributes": measurement.attributes,
        }
        self._lines.append(_text(record) + "\n")

    def on_step(self, step: Step) -> None:
        record = {"type": "step", "number": step.number, "trace_id": step.trace_id, "span_id": step.span_id}
        self._lines.append(_text({**record, "summary": step.summary()}) + "\n")

    def on_idle(self) -> None:
        self._write()

    def flush(self, timeout: float) -> None:
        self._write()
        lost, self._told = self.lost - self._told, self.lost
        if lost:
            raise OSError(f"{lost} records could not be written to {self.directory}")

    def close(self, timeout: float) -> None:
        try:
            self.flush(timeout)
        finally:
            self._leave()

    def after_fork(self) -> None:
        """A forked child writes files of its own, from its first record on; unwritten lines are its parent's."""
        self._leave()
        self._begin()

    def _begin(self) -> None:
        self._pid, self._part, self._stamp = os.getpid(), 0, time.time_ns()
        self._file: int | None = None
        self._size = 0
        self._parts: deque[Path] = deque()
        self._ended: list[Span] = []
        self._lines: list[str] = []
        self._new: dict[str, tuple[Span, Attributes]] = {}
        """Open spans that the file does not know of."""
        self._open: dict[str, tuple[Span, Attributes]] = {}
        """Open spans that it does."""
        self.lost = self._told = 0

    def _write(self) -> None:
        # Most spans end before anybody could have seen them open: those have no start line.
        starts = [_start(*opened) for opened in self._new.values()]
        ended, lines = self._ended, self._lines
        if not starts and not ended and not lines:
            return
        self._ended, self._lines = [], []
        lines = _ends(ended) + lines
        try:
            self._put("".join(starts + lines))
        except OSError as error:
            if lines and not self.lost:
                logger.warning("vgen: records are lost until %s can be written: %s", self.directory, error.strerror)
            self.lost += len(lines)
            return
        self._open |= self._new
        self._new.clear()
        if self._size >= self.max_bytes:
            self._leave()
            self._part += 1

    def _put(self, text: str) -> None:
        """Append all of `text` or nothing. Begins a file where there is none, or where it was deleted."""
        if self._file is not None and os.fstat(self._file).st_nlink == 0:
            self._leave()
        if self._file is None:
            self._file, self._size = self._create(), 0
        if not self._size:
            # Each file says by itself what is open. (What has ended meanwhile is told of in a moment, or was lost.)
            self._open = {key: opened for key, opened in self._open.items() if opened[0].end_ns is None}
            text = "".join([self._header(), *[_start(*opened) for opened in self._open.values()], text])
        rest = memoryview(text.encode("utf-8", "replace"))
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size = os.fstat(self._file).st_size

    def _create(self) -> int:
        self.directory.mkdir(parents=True, exist_ok=True)
        while True:
            name = f"vgen-{socket.gethostname()}-{self._pid}-{self._stamp}-{self._part:04d}.jsonl"
            self.path = self.directory / name
            try:
                file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
                break
            except FileExistsError:  # another sink's, or that of a former process with this number, as in a container
                self._stamp += 1
        if self.path not in self._parts:
            self._parts.append(self.path)
        while len(self._parts) > self.max_parts:
            with suppress(OSError):
                self._parts.popleft().unlink()
        return file

    def _leave(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _header(self) -> str:
        header = {"type": "header", "format": FORMAT, "vgen": __version__, "host": socket.gethostname()}
        return _text({**header, "pid": self._pid, "part": self._part, "unix_ns": time.time_ns()}) + "\n"


def _start(span: Span, attributes: Attributes) -> str:
    return f'{{"type":"start",{_span(span)},"attributes":{_text(attributes)}}}\n'


def _ends(spans: list[Span]) -> list[str]:
    return [
        f'{{"type":"end",{_span(span)},"end_unix_ns":{span.end_ns + span.offset_ns},"attributes":{attributes}'  # type: ignore[operator]
        f"{_rest(span) if span.links or span.events or span.error is not None or not span.current else ''}}}\n"
        for span, attributes in zip(spans, _texts([span.attributes for span in spans]), strict=True)
    ]


def _span(span: Span) -> str:
    parent = "null" if span.parent_id is None else f'"{span.parent_id}"'
    return (
        f'"name":{_text(span.name)},"trace_id":"{span.trace_id}","span_id":"{span.span_id}","parent_id":{parent},'
        f'"start_unix_ns":{span.start_ns + span.offset_ns}'
    )


def _rest(span: Span) -> str:
    """What most spans have not."""
    rest: dict[str, Any] = {} if span.current else {"current": False}
    if span.error is not None:
        rest["error"] = span.error
    if span.events:
        rest["events"] = [
            {"name": e.name, "unix_ns": e.time_ns + span.offset_ns, "attributes": e.attributes} for e in span.events
        ]
    if span.links:
        rest["links"] = [{"trace_id": k.trace_id, "span_id": k.span_id, "attributes": k.attributes} for k in span.links]
    return "," + _text(rest)[1:-1]


def _texts(flat: list[dict[str, Any]]) -> list[str]:
    """Each dict as JSON. One call of the encoder costs more than three small dicts in it, so they go in together."""
    try:
        # JSON escapes control characters in strings, and there is no dict within a dict: the marks are unambiguous.
        marked = _encode_marked(flat)[1:-1].replace("}\x1e{", "}\n{").replace("\x1e", ",")
    except (ValueError, TypeError):
        return [_text(attributes) for attributes in flat]
    return marked.split("\n") if flat else []


def _text(value: Any) -> str:
    try:
        return _encode(value)
    except (ValueError, TypeError):
        return _encode(_speakable(value))


def _speakable(value: Any) -> Any:
    if isinstance(value, float):
        return (
            value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        )
    if isinstance(value, int):
        return (
            value if value.bit_length() <= 1024 else f"<int of {value.bit_length()} bits>"
        )  # JSON could, Python refuses
    if isinstance(value, dict):
        return {str(key): _speakable(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return [_speakable(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value if value is None or isinstance(value, str) else f"<{type(value).__name__}>"
