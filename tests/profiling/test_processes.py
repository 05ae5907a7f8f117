"""However a process ends: what was accepted is on disk, or the loss is bounded and counted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vgen.analysis.run import read_run
from vgen.profiling import ProfilingContext, names

HEADER = """
import os, sys, time
from vgen.profiling import ProfilingContext, Sink
from vgen.profiling.sinks.jsonl import JsonlSink
"""


def python(code: str, *arguments: object, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HEADER + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


ENDS = {
    "returns": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an uncaught exception": ("raise OSError('gone')", 1),
    "an exception within a step": ("with p.step(1):\n    with p.span('x'):\n        raise OSError('gone')", 1),
}


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_python_exit_of_any_kind_loses_nothing(tmp_path, end):
    line, status = ENDS[end]
    code = "p = ProfilingContext([JsonlSink(sys.argv[1])])\nfor i in range(3000):\n    with p.span('n', i=i): pass\n"
    done = python(code + line, tmp_path)
    assert done.returncode == status, done.stderr
    run = read_run(tmp_path)
    assert run.problems == []
    assert [span.attributes["i"] for span in run.spans if span.name == "n"] == list(range(3000))
    if "step" in end:
        step = next(span for span in run.spans if span.name == names.STEP)
        assert (step.error, step.end_ns is not None) == ("OSError", True)
        assert run.rows[0][0] == 1


def test_a_kill_loses_at_most_the_last_200_ms(tmp_path):
    code = """
    p = ProfilingContext([JsonlSink(sys.argv[1])])
    print('ready', flush=True)
    with p.span('outer'):
        while True:
            with p.span('n'): time.sleep(0.001)
    """
    command = [sys.executable, "-c", HEADER + textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1.5)
        killed = time.time_ns()
        process.send_signal(signal.SIGKILL)
    run = read_run(tmp_path)
    last = max(span.end_ns for span in run.spans if span.end_ns is not None)
    assert (killed - last) / 1e9 < 0.2
    (outer,) = [span for span in run.spans if span.name == "outer"]
    assert outer.end_ns is None  # what was open is still to be seen
    assert all(span.parent_id == outer.span_id for span in run.spans if span is not outer)


@pytest.mark.parametrize("stuck", ["on_end", "flush", "close"])
def test_a_sink_that_hangs_does_not_keep_the_process(tmp_path, stuck):
    code = f"""
    class Stuck(Sink):
        def {stuck}(self, *_): time.sleep(600)
    p = ProfilingContext([Stuck(), JsonlSink(sys.argv[1])])
    for i in range(100):
        with p.span('n', i=i): pass
    """
    start = time.monotonic()
    done = python(code, tmp_path, timeout=30)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 6.0  # two seconds, and what a process takes to start and end
    assert len(read_run(tmp_path).spans) == 100
    if stuck == "on_end":
        assert "Stuck" in done.stderr


def test_a_fork_delivers_its_own_records_once_from_a_file_of_its_own(tmp_path):
    code = """
    p = ProfilingContext([JsonlSink(sys.argv[1])])
    for i in range(2000):
        with p.span('before', i=i): pass
    with p.span('around'):
        child = os.fork()
        for i in range(500):
            with p.span('child' if child == 0 else 'parent', i=i): pass
    if child == 0:
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    """
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    for name, count in (("before", 2000), ("child", 500), ("parent", 500)):
        assert sorted(span.attributes["i"] for span in run.spans if span.name == name) == list(range(count))
    assert len({span.span_id for span in run.spans}) == len(run.spans)
    around = [span for span in run.spans if span.name == "around"]
    assert {span.parent_id for span in run.spans if span.name == "child"} == {around[0].span_id}


def test_forks_while_the_queue_is_busy_neither_hang_nor_double(tmp_path):
    code = """
    import threading
    p = ProfilingContext([JsonlSink(sys.argv[1])])
    stop = False
    def busy():
        while not stop:
            with p.span('busy'): pass
            time.sleep(0.0002)
    thread = threading.Thread(target=busy); thread.start()
    children = []
    for n in range(10):
        child = os.fork()
        if child == 0:
            with p.span('child', n=n): pass
            p.close()
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    stop = True
    thread.join()
    assert codes == [0] * 10, codes
    """
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path)
    assert sorted(span.attributes["n"] for span in run.spans if span.name == "child") == list(range(10))
    assert len({span.span_id for span in run.spans}) == len(run.spans)


def test_a_spawned_process_goes_on_beneath_the_span_that_sent_it(tmp_path):
    code = """
    import multiprocessing
    def work(p, place):
        from vgen.profiling.sinks.jsonl import JsonlSink
        mine = ProfilingContext([JsonlSink(place)], parent=p.carrier())
        with mine.span('there'): pass
        mine.close()
        with p.span('aggregated'): pass
        assert p.summary()['aggregated.duration.count'] == 1
    if __name__ == '__main__':
        p = ProfilingContext([JsonlSink(sys.argv[1])], {'job': 'a'})
        with p.span('here'):
            process = multiprocessing.get_context('spawn').Process(target=work, args=(p, sys.argv[1]))
            process.start(); process.join()
        assert process.exitcode == 0
    """
    script = tmp_path / "script.py"
    script.write_text(HEADER + textwrap.dedent(code))
    place = tmp_path / "run"
    done = subprocess.run([sys.executable, script, place], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    spans = {span.name: span for span in read_run(place).spans}
    assert spans["there"].parent_id == spans["here"].span_id
    assert spans["there"].trace_id == spans["here"].trace_id


def test_ids_do_not_follow_from_a_seed(tmp_path):
    found = []
    for _ in range(2):
        random.seed(0)
        profiling = ProfilingContext()
        with profiling.span("x") as span:
            found += [span.span_id, span.trace_id]
    seeded = [
        python("import random; random.seed(0); p = ProfilingContext()\nwith p.span('x') as s: print(s.span_id)").stdout
    ]
    seeded += [
        python("import random; random.seed(0); p = ProfilingContext()\nwith p.span('x') as s: print(s.span_id)").stdout
    ]
    assert len({*found, *seeded}) == 6


def test_a_process_that_comes_back_with_the_same_number_does_not_write_into_the_old_file(tmp_path, monkeypatch):
    """As the first process of a restarted container does."""
    from vgen.profiling.sinks.jsonl import JsonlSink

    monkeypatch.setattr(os, "getpid", lambda: 1)
    for number in range(2):
        with ProfilingContext([JsonlSink(tmp_path)]) as profiling, profiling.step(number):
            pass
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == 2
    for file in files:
        assert json.loads(Path(file).read_text().splitlines()[0])["type"] == "header"
