"""The record on disk: one append-only file of JSON lines for each process.

Each line is an object with a `type`:

- `header`: the first of every file. `format` (1), vgen's version, `host`, `pid`, `unix_ns`.
- `start`: a span was opened. It is what remains of a span that never ended.
- `end`: the whole span, so that a reader needs no start line. A `current` of false marks one rebuilt afterwards.
- `measurement`: values of one instrument.
- `step`: a step's number and its closed row.

Times are Unix nanoseconds; within a trace their differences are monotonic. NaN and infinities are the
strings `"NaN"`, `"Infinity"`, `"-Infinity"`, because JSON has no numbers for them.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from ... import __version__
from ..records import Attributes, Measurement, Sink, Span, Step

FORMAT = 1

_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False).encode


class JsonlSink(Sink):
    """Writes `<directory>/vgen-<host>-<pid>-<part>.jsonl`.

    Lines reach the file every 50 ms: what a Python exception or an exit leaves behind is complete, a
    SIGKILL loses at most the last 200 ms. A file that reaches `max_bytes` is followed by the next part;
    of more than `max_parts` the oldest is deleted. A directory that cannot be written raises `OSError`
    here, at construction.
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_bytes: int = 64 << 20, max_parts: int = 16) -> None:
        self.directory = Path(directory)
        self.max_bytes, self.max_parts = max_bytes, max_parts
        self.lost = 0
        """Records that could not be written."""
        self._lines: list[str] = []
        self._start()

    @property
    def path(self) -> Path:
        """The file being written."""
        return self.directory / f"vgen-{socket.gethostname()}-{self._pid}-{self._part:04d}.jsonl"

    def on_start(self, span: Span, attributes: Attributes) -> None:
        if span.current:
            record: dict[str, Any] = {"type": "start", **_identity(span), "attributes": attributes}
            self._lines.append(_line(record))

    def on_end(self, span: Span) -> None:
        record: dict[str, Any] = {"type": "end", **_identity(span), "end_unix_ns": span.end_unix_ns}
        record["attributes"] = span.attributes
        if not span.current:
            record["current"] = False
        if span.error is not None:
            record["error"] = span.error
        if span.events:
            record["events"] = [
                {"name": e.name, "unix_ns": e.time_ns + span.offset_ns, "attributes": e.attributes}
                for e in span.events
            ]  # fmt: skip
        if span.links:
            record["links"] = [
                {"trace_id": k.trace_id, "span_id": k.span_id, "attributes": k.attributes} for k in span.links
            ]
        self._lines.append(_line(record))

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
        self._lines.append(_line(record))

    def on_step(self, step: Step) -> None:
        record = {"type": "step", "number": step.number, "trace_id": step.trace_id, "span_id": step.span_id}
        self._lines.append(_line({**record, "summary": step.summary()}))

    def on_idle(self) -> None:
        self._write()

    def flush(self, timeout: float) -> None:
        self._write()

    def close(self, timeout: float) -> None:
        self._write()
        os.close(self._file)

    def after_fork(self) -> None:
        """A forked child writes a file of its own; unwritten lines are its parent's."""
        self._lines = []
        os.close(self._file)
        self._start()

    def _start(self) -> None:
        self._pid, self._part = os.getpid(), 0
        self._open()

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._checked = time.monotonic()
        header = {"type": "header", "format": FORMAT, "vgen": __version__, "host": socket.gethostname()}
        self._put(_line({**header, "pid": self._pid, "part": self._part, "unix_ns": time.time_ns()}))

    def _write(self) -> None:
        if not self._lines:
            return
        lines, self._lines = self._lines, []
        try:
            if time.monotonic() - self._checked > 1.0:
                self._checked = time.monotonic()
                if os.fstat(self._file).st_nlink == 0:  # somebody deleted it: writing on would look like success
                    os.close(self._file)
                    self._open()
            self._put("".join(lines))
            if self._size >= self.max_bytes:
                self._rotate()
        except OSError:
            self.lost += len(lines)
            raise

    def _put(self, text: str) -> None:
        rest = memoryview(text.encode("utf-8", "replace"))
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._size = os.fstat(self._file).st_size

    def _rotate(self) -> None:
        os.close(self._file)
        oldest = self._part - self.max_parts + 1
        if oldest >= 0:
            (self.directory / f"vgen-{socket.gethostname()}-{self._pid}-{oldest:04d}.jsonl").unlink(missing_ok=True)
        self._part += 1
        self._open()


def _identity(span: Span) -> dict[str, Any]:
    return {
        "name": span.name,
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "start_unix_ns": span.start_unix_ns,
    }


def _line(record: dict[str, Any]) -> str:
    try:
        return _encode(record) + "\n"
    except (ValueError, TypeError):
        return _encode(_speakable(record)) + "\n"


def _speakable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): _speakable(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return [_speakable(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
