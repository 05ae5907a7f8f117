"""The lines of a run, process by process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...profiling import recording_format, semconv
from . import untrusted


@dataclass(slots=True)
class Process:
    """One process that wrote into the run."""

    key: str
    """What the names of its files have in common."""
    host: str = ""
    pid: int | None = None
    vgen: str = ""
    """The version of vgen that wrote the files."""
    rank: int | None = None
    last_ns: int = 0
    """The latest time in its files, in Unix nanoseconds by its own clock."""
    shift_ns: int = 0
    """What a reader adds to times of this process to get times on the clock of the run (`clocks.align`)."""
    shares_rank: bool = False
    """Whether another process of the run has the same rank, for example after a restart into the same directory."""
    first_part: int = 0
    """Which of its files is the first that still exists. Above 0, `max_parts` made the sink delete earlier ones."""
    damaged: int = 0
    """Lines of the current file that could not be read."""
    older: bool = False
    """Whether the current file has an older format, with other names."""

    @property
    def label(self) -> str:
        """`rank 3`, or host and process number where the rank is unknown or not unique."""
        place = f"{self.host}:{self.pid}" if self.host else self.key
        if self.rank is None:
            return place
        return f"rank {self.rank} ({place})" if self.shares_rank else f"rank {self.rank}"

    @property
    def attributes(self) -> dict[str, Any]:
        """What is known of the process, under OpenTelemetry's names and vgen's."""
        known = {semconv.HOST_NAME: self.host, semconv.PROCESS_ID: self.pid, semconv.RANK: self.rank}
        return {key: value for key, value in known.items() if value not in (None, "")}

    def take_header(self, line: str) -> int:
        """Learn from the first line of a file. Returns the file's format; raises ValueError for a damaged line."""
        header = recording_format.parse_header(line)
        if not self.host:
            self.first_part = header.part
        self.host, self.pid, self.vgen = untrusted.text(header.host), header.pid, untrusted.text(header.vgen)
        self.older = header.format < recording_format.FORMAT
        return header.format

    def parse(self, line: str) -> dict[str, Any] | None:
        """The record on a line, safe to print. None for a damaged line, which is counted."""
        try:
            return untrusted.clean(recording_format.parse(line))
        except ValueError:
            self.damaged += 1
            return None

    def take_rank(self, attributes: dict[str, Any]) -> None:
        """Learn the rank from the attributes of a record, if it is not known yet."""
        if self.rank is None and type(rank := attributes.get(semconv.RANK)) is int:
            self.rank = rank


def lines(place: str | Path, problems: list[str]) -> Iterator[tuple[Process, str]]:
    """Every line of a run except the headers, not parsed, with today's names; one process after the other.

    After each file, what could not be read is added to `problems`, one sentence each.
    """
    paths = recording_format.files(place)
    if not paths:
        shown = untrusted.text(str(place))
        problems.append(f"no record (*.jsonl) in {shown}" if Path(place).exists() else f"{shown} does not exist")
    process = Process("")
    for path in paths:
        key, name = untrusted.text(recording_format.process_key(path)), untrusted.text(path.name)
        if process.key != key:
            process = Process(key)
        process.older = False
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    if not line.startswith(recording_format.HEADER_START):
                        yield process, recording_format.with_new_names(line) if process.older else line
                        continue
                    try:
                        if process.take_header(line) > recording_format.FORMAT:
                            problems.append(f"{name} is of a newer vgen ({process.vgen}): read as far as known")
                    except ValueError:
                        process.damaged += 1
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
        if process.damaged:
            problems.append(f"{name}: {process.damaged} line{'s' * (process.damaged > 1)} cut off or damaged")
            process.damaged = 0


def deleted(place: str | Path, processes: Iterable[Process]) -> list[str]:
    """A sentence for each process of a directory whose first files do not exist any more."""
    return [
        f"the first {process.first_part} files of {process.label} were deleted, and what was in them"
        for process in processes
        if process.first_part and Path(place).is_dir()
    ]
