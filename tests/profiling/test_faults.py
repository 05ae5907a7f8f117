"""Bad luck on disk and bad ends: the work does not notice, and what was lost is known.

Sinks that raise or block are in `test_sink_pipeline.py`, forks and exits in `test_processes.py`, odd values in
`test_context.py` and `test_jsonl.py`.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.files import finish, lines, read_whole
from helpers.operations import calls_made
from helpers.recorded_run import read_run
from helpers.sinks import Gate, faulty
from helpers.waiting import wait_until

from vgen.profiling import Instrument, ProfilingContext, semconv
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.profiling.sinks.memory import MemorySink


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(ballast: Path) -> None:
    file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(file, bytes(1024))
    except OSError:
        pass
    finally:
        os.close(file)


def emit(profiling: ProfilingContext, count: int, **attributes: object) -> None:
    for n in range(count):
        with profiling.span("x", n=n, **attributes):
            pass


@pytest.mark.fault(
    point="the disk under a record",
    did="The disk is full",
    happens="Records are lost and counted, with one warning",
    within=60,
)
def test_a_full_disk_costs_the_records_and_one_warning(small_disk: Path, caplog: pytest.LogCaptureFixture):
    ballast = small_disk / "ballast"
    sink = JsonlSink(small_disk)
    profiling = ProfilingContext([sink])
    with profiling.step(1):
        emit(profiling, 10, before=True)
        assert profiling.flush()
    fill(ballast)
    with profiling.step(2) as full:
        for _ in range(5):
            emit(profiling, 100)
            assert profiling.flush() is False
    assert full.summary()[semconv.DROPPED.name] >= 490
    assert profiling.dropped()["JsonlSink"] >= 490
    [warning] = caplog.records
    assert os.strerror(errno.ENOSPC) in warning.getMessage()
    ballast.unlink()
    emit(profiling, 10, after=True)
    assert profiling.close()
    known = [span.attributes for span in read_run(small_disk).spans]
    assert sum("before" in own for own in known) == sum("after" in own for own in known) == 10
    assert lines(small_disk), "no line is torn"


FULL = """
import resource, signal, sys
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.jsonl import JsonlSink

profiling = ProfilingContext([JsonlSink(sys.argv[1])])

def emit(**attributes):
    for _ in range(100):
        with profiling.span("x", attributes):
            pass
    profiling.flush()

emit(before=True)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
for _ in range(5):
    emit()
print(profiling.dropped()["JsonlSink"])
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
emit(after=True)
profiling.close()
"""


@pytest.mark.fault(
    point="the disk under a record",
    did="The file may not grow for a while",
    happens="It is written again when it may",
    within=60,
)
def test_a_file_that_may_not_grow_is_written_again_when_it_may(tmp_path: Path):
    out, err = finish(tmp_path, FULL, tmp_path / "run")
    assert int(out) >= 400
    assert err.count("records are lost until") == 1
    spans = read_whole(tmp_path / "run").spans
    assert [sum(key in span.attributes for span in spans) for key in ("before", "after")] == [100, 100]
    assert 600 + 100 - len(spans) == int(out)


@pytest.mark.fault(
    point="the disk under a record",
    did="The next part cannot be begun",
    happens="It is begun later",
    within=60,
)
def test_a_new_part_that_cannot_be_begun_is_begun_later(small_disk: Path):
    sink = JsonlSink(small_disk / "run", max_bytes=4000)
    profiling = ProfilingContext([sink])
    fill(small_disk / "ballast")
    for _ in range(5):
        emit(profiling, 50)
        profiling.flush()
    (small_disk / "ballast").unlink()
    emit(profiling, 10, after=True)
    assert profiling.close()
    assert len(list((small_disk / "run").iterdir())) <= 3, "no heap of empty files"
    assert sum("after" in span.attributes for span in read_run(small_disk / "run").spans) == 10


@pytest.mark.parametrize("what", ["file", "folder", "parent"])
@pytest.mark.fault(
    point="the disk under a record",
    did="The file is deleted",
    happens="The record goes on in a new file",
    within=60,
)
def test_a_record_that_is_deleted_goes_on_in_a_new_file(tmp_path: Path, what: str):
    folder = tmp_path / "runs" / "a"
    sink = JsonlSink(folder)
    profiling = ProfilingContext([sink])
    with profiling.span("outer") as outer:
        emit(profiling, 10)
        profiling.flush()
        if what == "file":
            sink.path.unlink()
        else:
            shutil.rmtree(folder if what == "folder" else folder.parent)
        emit(profiling, 10, after=True)
        assert profiling.flush()
        [unended] = [span for span in read_whole(folder).spans if span.end_ns is None]
        assert unended.span_id == outer.span_id
    assert profiling.close()
    assert len([span for span in read_whole(folder).spans if "after" in span.attributes]) == 10
    assert profiling.dropped() == {}


def test_a_folder_that_cannot_be_made_again_costs_the_records(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "runs"
    profiling = ProfilingContext([JsonlSink(folder)])
    shutil.rmtree(folder)
    folder.touch()  # a file stands in its place
    emit(profiling, 10)
    profiling.flush()
    assert profiling.dropped() == {"JsonlSink": 10}
    folder.unlink()
    emit(profiling, 5)
    assert profiling.close()
    assert len(read_whole(folder).spans) == 5
    assert [r.getMessage().count("lost") for r in caplog.records if r.levelno == logging.WARNING] == [1, 1]


def test_a_healthy_sink_beside_a_broken_one_has_everything(tmp_path: Path):
    def fail() -> None:
        raise RuntimeError

    gate = Gate()
    memory, broken, blocked = MemorySink(), faulty("on_end", fail), faulty("on_end", gate)
    profiling = ProfilingContext([broken, blocked, JsonlSink(tmp_path), memory])
    with profiling.step(1):
        emit(profiling, 500)
    profiling.close(0.5)
    gate.open()
    assert len(memory.spans) == len(read_whole(tmp_path).spans) == 501


def test_the_works_own_operations_are_the_same_beside_a_hanging_sink_whose_queue_is_long(
    contexts: Callable[..., ProfilingContext],
):
    gate = Gate()
    healthy, hanging = contexts(faulty("on_start", lambda: None)), contexts(faulty("on_start", gate))
    emit(hanging, 20_000)
    hanging.summary()  # aggregates, which is not done at each record
    emit(healthy, 1)
    assert healthy.flush(20)
    alone, beside = (calls_made(lambda p=p: emit(p, 500, b=2.0, c="z")) for p in (healthy, hanging))
    assert abs(beside - alone) < alone / 100
    gate.open()


def test_a_broken_record_does_not_cost_its_neighbours(tmp_path: Path):
    """Should one line not be writable for a reason that nobody thought of, it alone is lost."""
    profiling = ProfilingContext([JsonlSink(tmp_path)])
    emit(profiling, 3)
    with profiling.span("odd") as span:
        pass
    span.name = object()  # type: ignore[assignment]
    emit(profiling, 3)
    profiling.close()
    assert len([span for span in read_whole(tmp_path).spans if span.name == "x"]) == 6


def test_nan_and_infinity_reach_every_sink(tmp_path: Path):
    memory = MemorySink()
    profiling = ProfilingContext([memory, JsonlSink(tmp_path)])
    with profiling.step(1) as step:
        for value in (float("nan"), float("inf"), -float("inf"), 1.0):
            for kind in ("counter", "gauge", "histogram"):
                profiling.record(Instrument(kind, kind), value)  # type: ignore[arg-type]
    assert profiling.close()
    summary = step.summary()
    assert (summary["counter"], summary["gauge"], summary["histogram.count"]) == (1.0, 1.0, 1)
    assert (summary["counter.nonfinite"], summary["histogram.nonfinite"]) == (3, 3)
    assert len(memory.measurements) == len(read_whole(tmp_path).measurements) == 12


@pytest.mark.fault(
    point="the disk under a record",
    did="The file system hangs",
    happens="The work goes on, and the process ends",
    within=60,
)
def test_a_folder_on_a_file_system_that_hangs_blocks_nobody(tmp_path: Path, waits: Any):
    """A pipe that nobody reads is a file whose writes block, as those to a dead NFS server do."""
    sink = JsonlSink(tmp_path)
    reading, writing = os.pipe()
    os.close(sink._file)  # type: ignore[arg-type]
    sink._file = writing
    profiling = ProfilingContext([sink])
    emit(profiling, 10, text="x" * 20_000)
    wait_until(lambda: not select.select([], [writing], [], 0)[1])  # the pipe is full
    emit(profiling, 1000)  # who wrote now would wait for a reader
    assert profiling.close(0.3) is False
    assert 0 < sum(waits) < 0.31
    assert profiling.dropped()["JsonlSink"] >= 1000
    os.close(reading)
