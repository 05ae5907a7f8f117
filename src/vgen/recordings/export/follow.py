"""`vgen trace --follow`: a run shown while it is still being written."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...profiling import recording_format, semconv
from ..reader import untrusted
from ..reader.processes import Process
from ..reader.run import SpanRecord, parse_span, thin

PERIOD = 0.25
"""Seconds between two looks at the files."""
QUIET = 1.0
"""A run whose processes are gone has ended after so many seconds without a new line."""


class Follower:
    """Reads what is new in the files of a run. An incomplete last line is left for the next time."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.processes: dict[str, Process] = {}
        self._read = Counter[Path]()
        """Bytes of each file that were read."""

    def poll(self) -> Iterator[SpanRecord]:
        """The spans that started or ended since the last call."""
        for file in recording_format.files(self.place):
            key = untrusted.text(recording_format.process_key(file))
            process = self.processes.setdefault(key, Process(key))
            try:
                with file.open("rb") as content:
                    content.seek(self._read[file])
                    for line in content:
                        if not line.endswith(b"\n"):
                            break
                        self._read[file] += len(line)
                        span = _span(line.decode("utf-8", "replace"), process)
                        if span is not None:
                            yield span
            except OSError:
                continue  # deleted, or not readable now

    def ended(self) -> bool:
        """Whether every process that wrote into the run is known to be gone."""
        return bool(self.processes) and all(map(_gone, self.processes.values()))


def _span(line: str, process: Process) -> SpanRecord | None:
    """The span on a line. Learns from a header; skips damaged lines, which `vgen report` counts."""
    if line.startswith(recording_format.HEADER_START):
        with suppress(ValueError):
            process.take_header(line)
        return None
    span = parse_span(recording_format.with_new_names(line) if process.older else line, process)
    if span is not None:
        process.take_rank(span.attributes)
    return span


def _gone(process: Process) -> bool:
    if process.host != socket.gethostname() or process.pid is None:
        return False
    try:
        os.kill(process.pid, 0)
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return state[:1] == ["Z"]  # a zombie: it has ended, and its parent has not asked for its exit status yet


def follow(place: Path, step: int | None) -> int:
    """Show the run at `place` until its processes have ended or the user presses Ctrl-C. Returns the exit status.

    A terminal shows the latest trace, or the one of the step, as a waterfall. A pipe gets a line when
    a span ends, and also when a long span starts, but none for `vgen.request`.
    """
    with suppress(KeyboardInterrupt):
        if not recording_format.files(place):
            print(f"vgen trace: waiting for a record in {place}", file=sys.stderr)
        (_draw if sys.stdout.isatty() else _print)(Follower(place), step)
    return 0


def _polls(follower: Follower) -> Iterator[list[SpanRecord]]:
    """What is new, every `PERIOD` seconds until the run has ended."""
    last = time.monotonic()
    while True:
        new = list(follower.poll())
        if new:
            last = time.monotonic()
        yield new
        if not new and time.monotonic() - last > QUIET and follower.ended():
            return
        time.sleep(PERIOD)


def _print(follower: Follower, step: int | None) -> None:
    for new in _polls(follower):
        for span in new:
            number = span.attributes.get(semconv.STEP_NUMBER)
            if span.name == semconv.REQUEST or (step is not None and number != step):
                continue
            when = time.strftime("%H:%M:%S", time.localtime((span.end_ns or span.start_ns) / 1e9))
            where = f"{span.process.label}  step {number}" if number is not None else span.process.label
            took = "began" if span.end_ns is None else f"{(span.end_ns - span.start_ns) / 1e9:.3f} s"
            failed = f"  ✗ {span.error}" if span.error is not None else ""
            print(f"{when}  {where}  {span.name}  {took}{failed}", flush=True)


def _draw(follower: Follower, step: int | None) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from .terminal import waterfall

    console = Console(highlight=False)
    trace = _LatestTrace(step)
    with Live(console=console, auto_refresh=False) as live:
        for new in _polls(follower):
            for span in new:
                trace.add(span)
            shown, left_out = trace.longest(max(console.height - 3, 3))
            unended = any(span.end_ns is None for span in shown)
            if shown and (new or unended):
                table = waterfall(shown, width=min(console.width, 120), now_ns=time.time_ns() if unended else 0)
                note = f"{left_out} shorter spans are not shown" if left_out else ""
                live.update(Group(table, Text(note, style="dim")), refresh=True)


class _LatestTrace:
    """The spans of the trace that started last; with a step number, of those that belong to that step."""

    def __init__(self, step: int | None) -> None:
        self._step = step
        self._trace_id, self._start_ns = "", -1
        self._spans: dict[str, SpanRecord] = {}

    def add(self, span: SpanRecord) -> None:
        """Take a span of any trace."""
        wanted = self._step is None or span.attributes.get(semconv.STEP_NUMBER) == self._step
        # The trace of an engine's shutdown comes last, and nobody wants to see it instead of the last step.
        later = span.trace_id != self._trace_id and span.start_ns > self._start_ns
        if wanted and later and span.name != semconv.ENGINE_CLOSE:
            self._trace_id, self._start_ns = span.trace_id, span.start_ns
            self._spans.clear()
        if span.trace_id == self._trace_id and (span.end_ns is not None or span.span_id not in self._spans):
            self._spans[span.span_id] = span

    def longest(self, most: int) -> tuple[list[SpanRecord], int]:
        """The longest `most` spans, and how many are left out."""
        left_out = thin(self._spans, 100 * most)  # which bounds the memory
        shown = dict(self._spans)
        return list(shown.values()), left_out + thin(shown, most)
