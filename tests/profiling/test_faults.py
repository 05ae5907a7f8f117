"""Sinks that raise, block, fill up or lose their disk: the work does not notice, the loss is counted."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
import time

import pytest

from vgen.analysis.run import read_run
from vgen.profiling import Instrument, ProfilingContext, Sink, names
from vgen.profiling.delivery import MAX_FAILURES
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.testing import MemorySink

COUNTER = Instrument("tests.counter", "counter")
METHODS = ("on_start", "on_end", "on_measurement", "on_step", "on_idle", "flush", "close")


def faulty(method: str, act, *, inline: bool) -> Sink:
    """A sink of which one method goes wrong."""
    return type("Faulty", (Sink,), {"inline": inline, method: lambda self, *_: act()})()


def train(profiling: ProfilingContext, steps: int = 30) -> float:
    """A loop that does nothing but telemetry; seconds."""
    start = time.monotonic()
    for number in range(steps):
        with profiling.step(number), profiling.span("work"):
            profiling.record(COUNTER, 1)
    return time.monotonic() - start


# On the thread of the work SystemExit is somebody's wish to end the process, and goes through.
RAISING = [
    (method, inline, kind)
    for method in METHODS
    for inline in (True, False)
    for kind in (OSError, RecursionError, SystemExit)
    if not inline or kind is not SystemExit or method in ("on_idle", "flush", "close")
]


@pytest.mark.parametrize(("method", "inline", "kind"), RAISING)
def test_a_sink_that_raises_is_isolated_reported_once_and_the_others_go_on(caplog, method, inline, kind):
    def fail() -> None:
        raise kind("with a secret in it")

    witness = MemorySink()
    profiling = ProfilingContext([faulty(method, fail, inline=inline), witness])
    with caplog.at_level(logging.WARNING, "vgen.telemetry"):
        train(profiling)
        profiling.close()
    assert len(witness.spans) == 60
    assert len(witness.rows) == 30
    about = [record.getMessage() for record in caplog.records if "Faulty" in record.getMessage()]
    assert len([text for text in about if "switched off" in text]) <= 1
    assert "secret" not in caplog.text
    if method in ("on_start", "on_end", "on_measurement", "on_step"):
        assert [text for text in about if "switched off" in text]
        assert profiling.dropped()["Faulty"] >= MAX_FAILURES


@pytest.mark.parametrize("method", METHODS)
def test_a_sink_that_blocks_costs_the_work_nothing_and_closing_keeps_its_deadline(method):
    gate = threading.Event()
    witness = MemorySink()
    profiling = ProfilingContext([faulty(method, gate.wait, inline=False), witness])
    try:
        assert train(profiling) < 2.0
        start = time.monotonic()
        closed = profiling.close(0.5)
        assert time.monotonic() - start < 0.7
        if method in ("on_start", "on_end", "on_measurement", "on_step"):
            assert not closed
            assert profiling.dropped()["Faulty"] > 0
        assert len(witness.spans) == 60
    finally:
        gate.set()


def test_a_full_queue_drops_and_counts_and_says_so_in_the_summary(monkeypatch):
    from vgen.profiling import delivery

    monkeypatch.setattr(delivery, "MAX_QUEUE", 100)
    gate = threading.Event()
    sink = faulty("on_end", gate.wait, inline=False)
    profiling = ProfilingContext([sink])
    with profiling.step(1) as row:
        for _ in range(500):
            with profiling.span("x"):
                pass
    lost = profiling.dropped()["Faulty"]
    assert 350 <= lost <= 500
    assert row.summary()[names.DROPPED.name] == pytest.approx(lost, abs=2)
    gate.set()
    profiling.close()


def test_a_directory_that_vanishes_is_made_again(tmp_path):
    place = tmp_path / "run"
    profiling = ProfilingContext([JsonlSink(place)])
    with profiling.span("first"):
        pass
    profiling.flush()
    shutil.rmtree(place)
    until = time.monotonic() + 10
    while not (place.exists() and any(span.name == "later" for span in read_run(place).spans)):
        assert time.monotonic() < until, "nothing was written after the directory had gone"
        with profiling.span("later"):
            pass
        time.sleep(0.05)
    profiling.close()


def test_a_full_disk_is_counted_and_the_loop_goes_on(tmp_path):
    """The size of files is limited, which fails as a full disk does."""
    code = """
import resource, signal, sys, time
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.jsonl import JsonlSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
p = ProfilingContext([JsonlSink(sys.argv[1])])
start = time.monotonic()
for i in range(300):
    with p.span('n', i=i): time.sleep(0.005)
took = time.monotonic() - start
start = time.monotonic()
p.close()
print(took, time.monotonic() - start, p.dropped().get('JsonlSink', 0))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    took, closed, lost = map(float, done.stdout.split())
    assert took < 5.0
    assert closed < 2.2
    assert lost > 100
    assert "JsonlSink" in done.stderr


def test_a_directory_that_cannot_be_written_is_an_error_at_construction(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        JsonlSink(tmp_path / "file" / "run")


def test_files_are_followed_by_the_next_and_the_oldest_go(tmp_path):
    profiling = ProfilingContext([JsonlSink(tmp_path, max_bytes=20_000, max_parts=3)])
    for number in range(40):
        with profiling.step(number):
            for _ in range(20):
                with profiling.span("x", text="y" * 50):
                    pass
        profiling.flush()
    profiling.close()
    files = list(tmp_path.glob("*.jsonl"))
    assert len(files) == 3
    assert all(file.stat().st_size < 60_000 for file in files)
    run = read_run(tmp_path)
    assert run.problems == []
    assert run.rows[-1][0] == 39
    for file in files:
        lines = file.read_text().splitlines()
        for line in lines:
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_sink_that_traces_itself_ends(tmp_path):
    """A backend that is instrumented with the very context that feeds it must not go round in circles."""

    class Circular(Sink):
        inline = True

        def on_end(self, span):
            with profiling.span("of the sink"):
                profiling.record(COUNTER, 1)

    witness = MemorySink()
    profiling = ProfilingContext([Circular(), witness])
    with profiling.step(1), profiling.span("work"):
        pass
    assert [span.name for span in witness.spans] == ["work", names.STEP]
