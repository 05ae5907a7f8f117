"""A sink that records the run on disk, in files of JSON lines (`profiling.recording_format` describes them)."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from .. import recording_format, semconv
from ..measurement import Attributes, Measurement
from ..span_model import Sink, Span, Step

logger = logging.getLogger("vgen.telemetry")


class JsonlSink(Sink):
    """Writes the records of this process into files of its own below `directory`.

    The files are named `vgen-<host>-<pid>-<start>-<part>.jsonl`. The sink never writes into a file that already exists.

    Lines reach the file every 50 ms. After a Python exception or a normal exit the record is complete; a SIGKILL loses
    at most the last 200 ms. When a file reaches `max_bytes`, the sink starts the next part, and it deletes the oldest
    part when there are more than `max_parts`. If the sink cannot write (for example: the disk is full), it counts the
    lost records in `lost` and warns once. If somebody deletes the directory, the sink makes it again. Raises `OSError`
    from the constructor when it cannot write to the directory.
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_bytes: int = 64 << 20, max_parts: int = 16) -> None:
        self.directory = Path(directory)
        self.max_bytes, self.max_parts = max_bytes, max_parts
        self._begin()
        try:
            self._append("")
        except OSError:
            self._close_file()
            raise

    def on_start(self, span: Span, attributes: Attributes) -> None:
        if span.current or span.name not in semconv.SELECTED:
            self._open_unwritten[span.span_id] = span, attributes

    def on_end(self, span: Span) -> None:
        if self._open_unwritten.pop(span.span_id, None) is None:
            self._open_written.pop(span.span_id, None)
        self._ended.append(span)

    def on_measurement(self, measurement: Measurement) -> None:
        self._lines.append(recording_format.measurement_line(measurement))

    def on_step(self, step: Step) -> None:
        self._lines.append(recording_format.step_line(step))

    def on_idle(self) -> None:
        self._write()

    def flush(self, timeout: float) -> None:
        self._write()
        lost, self._lost_reported = self.lost - self._lost_reported, self.lost
        if lost:
            raise OSError(f"{lost} records could not be written to {self.directory}")

    def close(self, timeout: float) -> None:
        try:
            self.flush(timeout)
        finally:
            self._close_file()

    def after_fork(self) -> None:
        """A forked child starts files of its own. The parent writes the lines that are not written yet."""
        self._close_file()
        self._begin()

    def _begin(self) -> None:
        self._pid, self._part, self._stamp = os.getpid(), 0, time.time_ns()
        self._file: int | None = None
        self._size = 0
        self._parts: deque[Path] = deque()
        self._ended: list[Span] = []
        self._lines: list[str] = []
        self._open_unwritten: dict[str, tuple[Span, Attributes]] = {}
        """Open spans without a line in the file."""
        self._open_written: dict[str, tuple[Span, Attributes]] = {}
        """Open spans with a `start` line in the file."""
        self.lost = self._lost_reported = 0

    def _write(self) -> None:
        # Most spans end before the next write, so they never get a start line.
        starts = [recording_format.start_line(*opened) for opened in self._open_unwritten.values()]
        ended, lines = self._ended, self._lines
        if not starts and not ended and not lines:
            return
        self._ended, self._lines = [], []
        lines = recording_format.end_lines(ended) + lines
        try:
            self._append("".join(starts + lines))
        except OSError as error:
            if lines and not self.lost:
                logger.warning("vgen: records are lost until %s can be written: %s", self.directory, error.strerror)
            self.lost += len(lines)
            return
        self._open_written |= self._open_unwritten
        self._open_unwritten.clear()
        if self._size >= self.max_bytes:
            self._close_file()
            self._part += 1

    def _append(self, text: str) -> None:
        """Append all of `text` or nothing. Creates a file if there is none, or if somebody deleted it."""
        if self._file is not None and os.fstat(self._file).st_nlink == 0:
            self._close_file()
        if self._file is None:
            self._file, self._size = self._create(), 0
        if not self._size:
            # Every file lists the open spans, because earlier parts may be deleted. A span that has ended meanwhile is
            # left out: its `end` line follows, or was lost.
            self._open_written = {key: opened for key, opened in self._open_written.items() if opened[0].end_ns is None}
            header = recording_format.Header(socket.gethostname(), self._pid, self._part)
            starts = [recording_format.start_line(*opened) for opened in self._open_written.values()]
            text = "".join([recording_format.header_line(header), *starts, text])
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
            name = recording_format.file_name(socket.gethostname(), self._pid, self._stamp, self._part)
            self.path = self.directory / name
            try:
                file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
                break
            except FileExistsError:  # of another sink, or of an earlier process with this number, as in a container
                self._stamp += 1
        if self.path not in self._parts:
            self._parts.append(self.path)
        while len(self._parts) > self.max_parts:
            with suppress(OSError):
                self._parts.popleft().unlink()
        return file

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)
