"""A run shown while it goes: open spans with the time they have taken so far."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..analysis.run import Process, SpanRecord, as_span, files, parse, thin
from ..profiling import names

PERIOD = 0.25
"""Seconds between two looks at the files."""
QUIET = 1.0
"""Seconds without a new line after which a run whose processes are gone has ended."""


class Follower:
    """What is new in the files of a run. Lines that are not ended yet are read when they are."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.processes: dict[str, Process] = {}
        self._read: dict[Path, int] = {}

    def poll(self) -> Iterator[tuple[Process, dict[str, Any]]]:
        """The records since the last time."""
        for file in files(self.place):
            process = self.processes.setdefault(file.stem.rpartition("-")[0], Process(file.stem))
            try:
                with file.open("rb") as content:
                    content.seek(self._read.get(file, 0))
                    for line in content:
                        if not line.endswith(b"\n"):
                            break
                        self._read[file] = self._read.get(file, 0) + len(line)
                        yield from _record(process, line)
            except OSError:
                continue  # deleted, or not to be read now

    def ended(self) -> bool:
        """Whether every process that writes is known to be gone."""
        return bool(self.processes) and all(map(_gone, self.processes.values()))


def _record(process: Process, line: bytes) -> Iterator[tuple[Process, dict[str, Any]]]:
    try:
        record = parse(line.decode("utf-8", "replace"))
    except ValueError:
        return
    if record["type"] == "header":
        process.host, process.pid = str(record.get("host", "")), record.get("pid")
        return
    if "attributes" in record and type(rank := record["attributes"].get(names.RANK)) is int:
        process.rank = rank
    yield process, record


def _gone(process: Process) -> bool:
    if process.host != socket.gethostname() or not isinstance(process.pid, int):
        return False
    try:
        os.kill(process.pid, 0)
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return state[:1] == ["Z"]  # ended, and nobody has asked for its exit status yet


def follow(place: Path, step: int | None) -> int:
    """Show the run at `place` until its processes have ended or Ctrl-C; returns the exit status.

    On a terminal the latest trace, or that of the step, as a waterfall; into a pipe a line for each span.
    """
    if not files(place):
        print(f"vgen trace: waiting for a record in {place}", file=sys.stderr)
    with suppress(KeyboardInterrupt):
        (_draw if sys.stdout.isatty() else _tell)(Follower(place), step)
    return 0


def _ticks(follower: Follower) -> Iterator[list[tuple[Process, dict[str, Any]]]]:
    """What is new, again and again, until the run has ended."""
    last = time.monotonic()
    while True:
        new = list(follower.poll())
        if new:
            last = time.monotonic()
        yield new
        if not new and time.monotonic() - last > QUIET and follower.ended():
            return
        time.sleep(PERIOD)


def _tell(follower: Follower, step: int | None) -> None:
    for new in _ticks(follower):
        for process, record in new:
            if record["type"] not in ("start", "end") or record["name"] == names.REQUEST:
                continue
            number = record["attributes"].get(names.STEP_NUMBER)
            if step is not None and number != step:
                continue
            span = as_span(record, process)
            when = time.strftime("%H:%M:%S", time.localtime((span.end_ns or span.start_ns) / 1e9))
            where = f"{process.label}  step {number}" if number is not None else process.label
            took = "began" if span.end_ns is None else f"{(span.end_ns - span.start_ns) / 1e9:.3f} s"
            failed = f"  ✗ {span.error}" if span.error is not None else ""
            print(f"{when}  {where}  {span.name}  {took}{failed}", flush=True)


def _draw(follower: Follower, step: int | None) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from .terminal import waterfall

    console = Console(highlight=False)
    spans: dict[str, SpanRecord] = {}
    trace, latest = "", -1
    with Live(console=console, auto_refresh=False) as live:
        for new in _ticks(follower):
            for process, record in new:
                if record["type"] not in ("start", "end"):
                    continue
                span = as_span(record, process)
                asked = step is None or record["attributes"].get(names.STEP_NUMBER) == step
                if asked and span.trace_id != trace and span.start_ns > latest and span.name != names.ENGINE_CLOSE:
                    trace, latest = span.trace_id, span.start_ns
                    spans.clear()
                if span.trace_id == trace and (span.end_ns is not None or span.span_id not in spans):
                    spans[span.span_id] = span
            room = max(console.height - 3, 3)
            left_out = thin(spans, 100 * room)
            shown = dict(spans)
            left_out += thin(shown, room)
            opened = any(span.end_ns is None for span in shown.values())
            if shown and (new or opened):
                width, now = min(console.width, 120), time.time_ns() if opened else 0
                table = waterfall(list(shown.values()), width=width, now_ns=now)
                note = f"{left_out} shorter spans are not shown" if left_out else ""
                live.update(Group(table, Text(note, style="dim")), refresh=True)
