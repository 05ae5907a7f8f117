"""Every way in which a process begins and ends: what was recorded is on disk once, or its loss has a bound."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from helpers.files import finish, of_type, read_whole, start
from helpers.recorded_run import read_run
from helpers.waiting import wait_until

from vgen.profiling import ProfilingContext
from vgen.profiling.sink_pipeline import POLL_SECONDS
from vgen.profiling.sinks.jsonl import JsonlSink

# Exits -------------------------------------------------------------------------------------------------------------

EXITS = """
import os, sys, threading
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.jsonl import JsonlSink

profiling = ProfilingContext([JsonlSink(sys.argv[1])])

def work():
    with profiling.step(1):
        for n in range(1000):
            with profiling.span("x", n=n):
                pass
        END

END_OUTSIDE
work()
"""

ENDS = {
    "by itself": ("pass", "", 0),
    "by sys.exit": ("sys.exit(3)", "", 3),
    "by an exception": ("raise ValueError('no')", "", 1),
    "by Ctrl-C": ("os.kill(os.getpid(), 2)\n        __import__('time').sleep(5)", "", -signal.SIGINT),
    "in a thread": ("pass", "threading.Thread(target=work).start(); work = lambda: None", 0),
    "by an exception in a thread": ("raise ValueError", "threading.Thread(target=work).start(); work = int", 0),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.fault(
    point="the end of a process that records",
    did="A process ends by itself, by an exception, by `sys.exit` or by Ctrl-C",
    happens="Nothing is lost",
    within=60,
)
def test_a_process_that_ends_loses_nothing(tmp_path: Path, end: str):
    inside, outside, returns = ENDS[end]
    finish(tmp_path, EXITS.replace("END_OUTSIDE", outside).replace("END", inside), tmp_path / "run", returns=returns)
    run = read_whole(tmp_path / "run")
    assert len(run.spans) == 1001
    assert all(span.end_ns is not None for span in run.spans)
    assert len(run.rows) == 1


@pytest.mark.fault(
    point="the end of a process that records",
    did="`os._exit`",
    happens="What waits is lost; the file is whole",
    within=60,
)
def test_os_exit_loses_what_waits_and_leaves_a_whole_file(tmp_path: Path):
    finish(
        tmp_path, EXITS.replace("END_OUTSIDE", "").replace("END", "profiling.flush(); os._exit(0)"), tmp_path / "run"
    )
    run = read_whole(tmp_path / "run")
    assert len(run.spans) == 1001
    assert [span.name for span in run.spans if span.end_ns is None] == ["train.step"]


HANGS = """
import sys, threading
from vgen.profiling import ProfilingContext, Sink
from vgen.profiling.sinks.jsonl import JsonlSink

class Hanging(Sink):
    def METHOD(self, *_):
        threading.Event().wait()

profiling = ProfilingContext([Hanging(), JsonlSink(sys.argv[1])])
for n in range(100):
    with profiling.step(n):
        pass
"""


@pytest.mark.parametrize("method", ["on_end", "close"])
@pytest.mark.fault(
    point="the end of a process that records",
    did="A sink hangs at the process's end",
    happens="The process ends after two seconds",
    within=60,
)
def test_a_process_with_a_hanging_sink_ends_after_the_deadline_of_two_seconds(tmp_path: Path, method: str):
    _, err = finish(tmp_path, HANGS.replace("METHOD", method), tmp_path / "run")
    assert len(read_whole(tmp_path / "run").spans) == 100
    assert "sinks that failed to close within 2.0 s: ['Hanging']" in err


KILLED = """
import sys, threading
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.jsonl import JsonlSink

idle = threading.Event()

class Telling(JsonlSink):
    delivered = -1

    def on_end(self, span):
        super().on_end(span)
        self.delivered = span.attributes["n"]

    def on_idle(self):
        super().on_idle()
        print(self.delivered, flush=True)
        idle.set()

profiling = ProfilingContext([Telling(sys.argv[1])])
with profiling.span("train"):
    n = 0
    while True:
        with profiling.span("x", n=n):
            n += 1
        if n % 1000 == 0:  # or the queue would overflow
            idle.wait()
            idle.clear()
"""


@pytest.mark.fault(
    point="the end of a process that records",
    did="SIGKILL",
    happens="At most the last records are lost; the file can be read",
    within=60,
)
def test_sigkill_loses_at_most_what_came_after_the_last_look_into_the_queue(tmp_path: Path):
    with start(tmp_path, KILLED, tmp_path / "run") as process:
        assert process.stdout is not None
        told = next(number for line in process.stdout if (number := int(line)) > 1500)
        process.kill()
    run = read_run(tmp_path / "run")
    written = [span.attributes["n"] for span in run.spans if span.end_ns is not None]
    assert written == list(range(len(written))), "and nothing in between"
    assert len(written) > told
    assert "train" in [span.name for span in run.spans if span.end_ns is None]


# Forks -------------------------------------------------------------------------------------------------------------

BUSY_FORKS = """
import faulthandler, os, sys, threading
from vgen.profiling import Instrument, ProfilingContext
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.profiling.sinks.memory import MemorySink

memory = MemorySink()
profiling = ProfilingContext([JsonlSink(sys.argv[1]), memory])
stop, counter = threading.Event(), Instrument("c", "counter")

def hammer(name):
    n = 0
    while not stop.is_set():
        with profiling.span("busy", {"thread": name, "n": n}) as span:
            span.set(a=1)
            profiling.record(counter, 1)
        profiling.summary()
        n += 1

threads = [threading.Thread(target=hammer, args=(name,), daemon=True) for name in range(2)]
for thread in threads:
    thread.start()
for number in range(15):
    with profiling.step(number) as step:
        pid = os.fork()
        if pid == 0:
            faulthandler.dump_traceback_later(25, exit=True)  # should it hang
            assert not memory.spans and not memory.open
            for n in range(50):
                with profiling.span("child", {"number": number, "n": n}):
                    profiling.record(counter, 1)
            assert profiling.summary()["c"] == profiling.run.summary()["c"] == 50, profiling.summary()
            step.set(child=True)
        else:
            _, status = os.waitpid(pid, 0)
            assert status == 0, status
    if pid == 0:
        with profiling.span("after", {"number": number}):
            pass
        profiling.close()
        os._exit(0 if not profiling.dropped() else 1)
stop.set()
for thread in threads:
    thread.join()
profiling.close()
assert not profiling.dropped(), profiling.dropped()
print(len(memory.named("busy")))
"""


def test_parent_and_child_each_record_what_is_theirs_once(tmp_path: Path):
    """Forked while other threads record, sum up and write."""
    out, _ = finish(tmp_path, BUSY_FORKS, tmp_path / "run", timeout=60)
    run = read_whole(tmp_path / "run")
    spans: dict[str, list[object]] = {}
    for span in run.spans:
        spans.setdefault(span.name, []).append(span)
    assert len(spans["busy"]) == int(out)
    steps = {span.attributes["vgen.step"]: span for span in run.spans if span.name == "train.step"}
    assert sorted(steps) == list(range(15))
    assert all(span.end_ns is not None and "child" not in span.attributes for span in steps.values())
    children = [span for span in run.spans if span.name == "child"]
    assert {(s.attributes["number"], s.attributes["n"]) for s in children} == {
        (i, n) for i in range(15) for n in range(50)
    }
    assert len(children) == 750
    assert all(span.parent_id == steps[span.attributes["number"]].span_id for span in children)
    assert [span.parent_id for span in run.spans if span.name == "after"] == [None] * 15
    assert len({header["pid"] for header in of_type(tmp_path / "run", "header")}) == 16
    assert len(run.rows) == 15, "a step that was open is its parent's to end"


MULTIPROCESSING = """
import multiprocessing, sys, concurrent.futures
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.jsonl import JsonlSink

profiling = ProfilingContext([JsonlSink(sys.argv[1])])

def child(n):
    with profiling.span("child", n=n):
        pass

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    with profiling.span("outer"):
        processes = [context.Process(target=child, args=(n,)) for n in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            list(pool.map(child, range(3, 9)))
        idle = context.Process(target=int)
        idle.start()
        idle.join()
"""


@pytest.mark.fault(
    point="the end of a process that records",
    did="Forked workers never close",
    happens="Nothing is lost or doubled",
    within=60,
)
def test_forked_workers_of_multiprocessing_lose_nothing_though_they_never_close(tmp_path: Path):
    finish(tmp_path, MULTIPROCESSING, tmp_path / "run")
    run = read_whole(tmp_path / "run")
    assert sorted(span.attributes["n"] for span in run.spans if span.name == "child") == list(range(9))
    [outer] = [span for span in run.spans if span.name == "outer"]
    assert {span.parent_id for span in run.spans if span.name == "child"} == {outer.span_id}
    assert len(of_type(tmp_path / "run", "header")) <= 1 + 3 + 2, "who records nothing makes no file"


INLINE_FORK = """
import os, sys
from vgen.profiling import ProfilingContext, Sink

class Sending(Sink):
    inline = True
    held = 0
    def on_end(self, span):
        self.held += 1
    def close(self, timeout):
        print(os.getpid() == parent, self.held, flush=True)
    def after_fork(self):
        self.held = 0

parent = os.getpid()
profiling = ProfilingContext([Sending()])
with profiling.span("x"):
    pass
if os.fork() == 0:
    with profiling.span("y"), profiling.span("z"):
        pass
    sys.exit()
os.wait()
"""


def test_an_inline_sink_is_closed_in_the_child_too(tmp_path: Path):
    out, _ = finish(tmp_path, INLINE_FORK)
    assert sorted(out.splitlines()) == ["False 2", "True 1"]


FORK_BESIDE_A_HANGING_SINK = """
import os, threading
from vgen.profiling import ProfilingContext, Sink

hangs = threading.Event()

class Hanging(Sink):
    def __init__(self):
        self.pid = os.getpid()
    def on_end(self, span):
        if os.getpid() == self.pid:
            hangs.set()
            threading.Event().wait()

profiling = ProfilingContext([Hanging()])
for _ in range(100):
    with profiling.span("x"):
        pass
assert hangs.wait(20)
if os.fork() == 0:
    with profiling.span("y"):
        pass
    good = profiling.close() and not profiling.dropped()
    os._exit(0 if good else 1)
_, status = os.wait()
print(status)
profiling.close(0.1)
"""


def test_a_child_has_a_worker_and_a_queue_of_its_own(tmp_path: Path):
    out, _ = finish(tmp_path, FORK_BESIDE_A_HANGING_SINK)
    assert out == "0\n"


# Spawned and other processes ---------------------------------------------------------------------------------------

SPAWN = """
import multiprocessing, random, sys
from vgen.profiling import Instrument, ProfilingContext
from vgen.profiling.sinks.jsonl import JsonlSink

COUNTER = Instrument("c", "counter")

def child(received, folder, results):
    random.seed(0)
    own = ProfilingContext([JsonlSink(folder)], {"vgen.rank": 1}, parent=received.carrier())
    with own.step(1), own.span("inner"):
        pass
    with received.span("aggregated"):
        received.record(COUNTER, 7)
    results.put((received.run.to_dict(), received.carrier()))

if __name__ == "__main__":
    random.seed(0)
    folder = sys.argv[1]
    context = multiprocessing.get_context("spawn")
    profiling = ProfilingContext([JsonlSink(folder)], {"vgen.rank": 0})
    results = context.Queue()
    with profiling.span("outer") as outer:
        process = context.Process(target=child, args=(profiling.bind(a=1), folder, results))
        process.start()
        aggregates, carrier = results.get(timeout=30)
        process.join()
        assert carrier == profiling.carrier(), carrier
    from vgen.profiling.aggregation import Row
    total = Row.from_dict(aggregates)
    total.merge(profiling.run)
    assert total.summary()["c"] == 7
    assert total.summary()["aggregated.duration.count"] == 1
    assert not profiling.summary().get("c")
    assert process.exitcode == 0
"""


def test_a_spawned_process_goes_on_with_the_trace(tmp_path: Path):
    finish(tmp_path, SPAWN, tmp_path / "run")
    run = read_whole(tmp_path / "run")
    spans = {span.name: span for span in run.spans}
    assert set(spans) == {"outer", "train.step", "inner"}
    assert spans["train.step"].parent_id == spans["outer"].span_id
    assert {span.trace_id for span in run.spans} == {spans["outer"].trace_id}
    assert spans["inner"].attributes == {"vgen.rank": 1, "vgen.step": 1}
    assert len(of_type(tmp_path / "run", "header")) == 2


IDS = """
import multiprocessing, random
from vgen.profiling import ProfilingContext

def ids(_=None):
    random.seed(0)
    found = []
    for _ in range(600):
        with profiling.span("x") as span:
            found += [span.trace_id, span.span_id]
    return found

profiling = ProfilingContext()

if __name__ == "__main__":
    ids()
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            for found in pool.map(ids, range(2), chunksize=1):
                print(*found, sep="\\n")
    print(*ids(), sep="\\n")
"""


def test_ids_never_collide_whatever_is_seeded_and_however_processes_begin(tmp_path: Path):
    programs = [start(tmp_path, IDS) for _ in range(2)]
    found = [line for program in programs for line in program.communicate(timeout=60)[0].split()]
    assert len(found) == 2 * 5 * 1200
    assert len(set(found)) == len(found)


def test_an_idle_worker_does_next_to_nothing_between_two_naps(
    tmp_path: Path, contexts: Callable[..., ProfilingContext]
):
    """A nap takes a twentieth of a second: so this is far below 1 % of one core."""
    calls, naps = 0, 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls, naps
        if threading.current_thread().name == "vgen-JsonlSink":
            calls += event in ("call", "c_call")
            naps += event == "call" and frame.f_code is threading.Event.wait.__code__

    threading.setprofile(count)
    try:
        profiling = contexts(JsonlSink(tmp_path))
    finally:
        threading.setprofile(None)
    with profiling.span("x"):
        pass
    assert profiling.flush(20)
    calls = naps = 0
    wait_until(lambda: naps >= 10)
    assert calls / naps < 50
    assert POLL_SECONDS >= 0.05
