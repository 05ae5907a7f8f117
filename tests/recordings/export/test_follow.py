"""A run shown while it goes."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = """
import sys, time
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.jsonl import JsonlSink
profiling = ProfilingContext([JsonlSink(sys.argv[1])])
for number in (1, 2):
    with profiling.step(number):
        with profiling.span("update"):
            print("open", flush=True)
            sys.stdin.readline()
profiling.close()
"""


@pytest.mark.fault(
    point="who watches or exports a run",
    did="The run's process ends without being waited for",
    happens="The watch ends with it",
    within=60,
)
def test_spans_show_while_they_are_open_and_it_ends_with_the_run(tmp_path):
    folder = tmp_path / "run"
    follow = subprocess.Popen(
        [sys.executable, "-u", "-m", "vgen.cli", "trace", str(folder), "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follow.stdout is not None
    assert follow.stderr is not None
    assert "waiting for a record in" in follow.stderr.readline()  # before there is anything
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdin is not None
    try:
        while "update  began" not in (line := follow.stdout.readline()):
            assert line, "it ended before the run did"
        assert run.poll() is None  # it is open still
        for _ in range(2):
            run.stdin.write("\n")
            run.stdin.flush()
        # (not waited for: a process that has ended and is still its parent's to bury writes no more either)
        said, problems = follow.communicate(timeout=60)
    finally:
        for process in (run, follow):
            process.kill()
            process.wait()
    assert (follow.returncode, problems) == (0, "")
    ended = [line for line in said.splitlines() if line.endswith(" s")]
    assert [line.split("  ")[2:4] for line in ended if "train.step" in line] == [
        ["step 1", "train.step"],
        ["step 2", "train.step"],
    ]


@pytest.mark.fault(
    point="who watches or exports a run",
    did="Ctrl-C while a run is followed",
    happens="Status 0, without a traceback",
    within=60,
)
def test_ctrl_c_ends_it(tmp_path):
    import signal

    follow = subprocess.Popen(
        [sys.executable, "-m", "vgen.cli", "trace", str(tmp_path / "never"), "--follow"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follow.stderr is not None
    try:
        follow.stderr.readline()
        follow.send_signal(signal.SIGINT)
        assert follow.wait(30) == 0
        assert follow.stderr.read() == ""
    finally:
        follow.kill()
        follow.wait()
