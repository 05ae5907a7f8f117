"""What counts as an engine that cannot work, with processes that are stopped, killed, busy or silent."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from helpers.waiting import wait_until

from vgen.engines.server import core_health
from vgen.engines.server.core_health import CoreHealth, end_with_socket_threads


def sleep_for_ever(_: object = None) -> None:
    threading.Event().wait()


def compute_for_ever(ready: object) -> None:
    while True:
        pass


def have_a_child(ready) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ready.send(child.pid)
    sleep_for_ever()


def have_a_busy_child(ready) -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    ready.send(child.pid)
    sleep_for_ever()


class Engine:
    """Answers once `answers` is set."""

    errored = False
    engine_core: Any = None
    vllm_config: Any = None

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.answers.set()

    async def is_paused(self) -> bool:
        await self.answers.wait()
        return False


@pytest.fixture
def core():
    """Starts processes in place of vLLM's cores. A function that has a child sends its PID."""
    context, started = multiprocessing.get_context("spawn"), []

    def start(run: Callable[..., None], *, child: bool = False):
        here, there = context.Pipe()
        process = context.Process(target=run, args=(there,), name="EngineCore_0")
        process.start()
        started.append(process)
        children = [here.recv()] if child else []
        return process, *children

    yield start
    for process in started:
        for each in [*psutil.Process(process.pid).children(recursive=True)] if process.is_alive() else []:
            each.kill()
        process.kill()
        process.join()


def send(pid: int, number: int, status: str) -> None:
    os.kill(pid, number)
    wait_until(lambda: psutil.Process(pid).status() == status)


async def looks(health: CoreHealth, times: int = 3) -> str:
    for _ in range(times):
        health.look()
        await asyncio.sleep(0)
    return health.problem


@pytest.mark.fault(
    point="the engine's core behind a server",
    did="The core is stopped with SIGSTOP",
    happens="`/health` names it until it goes on",
    within=60,
)
async def test_a_core_that_is_stopped_is_a_problem_until_it_goes_on(core):
    (process,) = core(sleep_for_ever)
    pid = process.pid
    health = CoreHealth(Engine(), [process])
    assert await looks(health) == ""
    send(pid, signal.SIGSTOP, psutil.STATUS_STOPPED)
    assert str(pid) in await looks(health)
    assert "is stopped (by SIGSTOP" in health.problem
    send(pid, signal.SIGCONT, psutil.STATUS_SLEEPING)
    assert (await looks(health), health.gone) == ("", False)


async def test_a_worker_of_a_core_counts_as_well(core):
    process, worker = core(have_a_child, child=True)
    health = CoreHealth(Engine(), [process])
    send(worker, signal.SIGSTOP, psutil.STATUS_STOPPED)
    assert str(worker) in await looks(health)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: psutil.Process(worker).status() == psutil.STATUS_ZOMBIE)
    health._engine.errored = True  # vLLM notices it, and the core that it cannot work without it
    assert await looks(health) == f"the engine has failed: process {worker} has ended"


@pytest.mark.parametrize(("kill", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
@pytest.mark.fault(
    point="the engine's core behind a server",
    did="The core ends by SIGKILL or SIGSEGV",
    happens="The server ends and logs the process and the signal",
    within=60,
)
async def test_a_core_that_was_killed_ends_the_server_with_its_name_and_the_signal(core, caplog, kill, name):
    (process,) = core(sleep_for_ever)
    health, ended = CoreHealth(Engine(), [process]), asyncio.Event()
    watch = asyncio.create_task(health.watch(ended.set))
    os.kill(process.pid, kill)
    async with asyncio.timeout(10):
        await ended.wait()
    await watch
    assert health.problem == f"the engine's core has ended: EngineCore_0 (PID {process.pid}) was ended by {name}"
    assert f"EngineError: {health.problem}" in caplog.messages  # the launcher finds it in the log


def fail() -> None:
    raise SystemExit(3)


async def test_a_core_that_has_failed_by_itself_has_logged_the_cause_already(core, caplog):
    process = multiprocessing.get_context("spawn").Process(target=fail)
    process.start()
    process.join()
    health = CoreHealth(Engine(), [process])
    await health.watch(lambda: None)
    assert health.problem.endswith("ended with status 3")
    assert [line for line in caplog.messages if line.startswith("EngineError")] == []


async def test_an_engine_that_vllm_has_given_up_is_gone(core):
    engine = Engine()
    engine.errored = True
    health = CoreHealth(engine, [])
    await health.watch(lambda: None)
    assert health.problem == "the engine has failed"


def end() -> None:
    pass


@pytest.fixture
def ended_core():
    process = multiprocessing.get_context("spawn").Process(target=end, name="EngineCore_DP0")
    process.start()
    process.join()
    return process


def ask_to_end(engine: Engine, *, failed: str | None = None) -> None:
    """What vLLM does before it ends its cores: on SIGTERM, or because one has failed."""
    manager = SimpleNamespace(manager_stopped=threading.Event(), failed_proc_name=failed)
    manager.manager_stopped.set()
    engine.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))


async def test_a_core_that_has_no_more_work_ends_before_the_others(core, ended_core):
    (other,) = core(sleep_for_ever)
    health = CoreHealth(Engine(), [ended_core, other])
    assert (await looks(health), health.gone) == ("", False)
    health._engine.errored = True  # nobody has asked for it
    assert (
        await looks(health) == f"the engine's core has ended: EngineCore_DP0 (PID {ended_core.pid}) ended with status 0"
    )


@pytest.mark.parametrize(("failed", "level"), [(None, logging.WARNING), ("EngineCore_DP0", logging.ERROR)])
async def test_an_end_that_was_asked_for_is_no_error(ended_core, caplog, failed, level):
    engine = Engine()
    ask_to_end(engine, failed=failed)
    health = CoreHealth(engine, [ended_core])
    assert await looks(health, 1) == ("" if failed is None else health.problem)
    assert health.gone is (failed is not None)
    engine.errored = True  # vLLM has ended all of it
    await health.watch(lambda: None)
    assert "ended with status 0" in health.problem
    assert [record.levelno for record in caplog.records] == [level]


async def test_a_core_that_ends_although_nobody_has_asked_for_it_is_gone(ended_core, caplog):
    health = CoreHealth(Engine(), [ended_core])
    await health.watch(lambda: None)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setenv(core_health.SILENT_VARIABLE, "0.5")


async def until(condition: Callable[[], bool], health: CoreHealth, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            health.look()
            await asyncio.sleep(0.02)


@pytest.mark.fault(
    point="the engine's core behind a server",
    did="The core answers nothing and uses no processor time",
    happens="`/health` says so within seconds",
    within=60,
)
async def test_a_core_that_answers_nothing_and_computes_nothing_is_a_problem(core, soon):
    engine = Engine()
    engine.answers.clear()
    health = CoreHealth(engine, [core(sleep_for_ever)[0]])
    await until(lambda: "answered nothing for" in health.problem, health)
    engine.answers.set()
    await until(lambda: not health.problem, health)
    assert not health.gone


@pytest.mark.parametrize(("run", "child"), [(compute_for_ever, False), (have_a_busy_child, True)])
async def test_a_core_that_computes_is_only_busy(core, soon, run, child):
    engine = Engine()
    engine.answers.clear()
    process, *_ = core(run, child=child)
    busy = psutil.Process(process.pid)

    def used() -> float:
        return sum(each.cpu_times().user for each in (busy, *busy.children(recursive=True)))

    started = wait_until(lambda: used() > 0.1 and used(), 60)
    health = CoreHealth(engine, [process])
    await until(lambda: bool(health.problem) or used() > started + 2.0, health, 60)  # four times the limit
    assert health.problem == ""


ANY_CORE: Any = SimpleNamespace(pid=os.getpid(), exitcode=None)
"""A process that lives. What it does is read from `Times` and a test's own `_status`."""


class Times:
    """A clock that goes on by a second at each look, and the processor time that each process has used by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.used = 0.0, 0.0
        self.monotonic = lambda: self.now
        monkeypatch.setattr(core_health, "time", self)
        monkeypatch.setattr(core_health, "_cpu_times", lambda process: (self.used, 0.0, 0.0, 0.0))

    def look(self, health: CoreHealth, seconds: int, *, busy: bool = False) -> str:
        for _ in range(seconds):
            self.now, self.used = self.now + 1.0, self.used + busy
            health.look()
        return health.problem


@pytest.fixture
def times(monkeypatch):
    return Times(monkeypatch)


def silent_engine(device: str | None = "cpu", **parallel: object) -> Engine:
    engine = Engine()
    engine.answers.clear()
    device_config, parallel_config = SimpleNamespace(device_type=device), SimpleNamespace(**parallel)
    engine.vllm_config = SimpleNamespace(device_config=device_config, parallel_config=parallel_config)
    return engine


@pytest.mark.parametrize(
    ("device", "parallel", "variable", "seconds"),
    [
        ("cpu", {}, None, 60),
        ("cpu", {"nnodes": 1, "data_parallel_size": 2, "data_parallel_size_local": 2}, None, 60),
        ("cuda", {}, None, 600),
        (None, {}, None, 600),
        ("cuda", {}, "20", 20),
        ("cpu", {}, "a minute", 60),
        ("cpu", {}, "0", None),
        ("cpu", {"nnodes": 2}, None, None),
        ("cpu", {"use_ray": True}, None, None),
        ("cpu", {"distributed_executor_backend": "ray"}, None, None),
        ("cpu", {"data_parallel_backend": "ray"}, "20", None),
        ("cpu", {"data_parallel_size": 2, "data_parallel_size_local": 1}, None, None),
    ],
)
async def test_how_long_a_core_may_be_silent_depends_on_where_it_works(
    times, monkeypatch, device, parallel, variable, seconds
):
    if variable is not None:
        monkeypatch.setenv(core_health.SILENT_VARIABLE, variable)
    monkeypatch.setattr(core_health, "_status", lambda process: psutil.STATUS_SLEEPING)
    health = CoreHealth(silent_engine(device, **parallel), [ANY_CORE])
    assert times.look(health, (seconds or 1000) + 1) == ""  # the first look only asks
    assert times.look(health, 1) == (
        f"the engine's core has answered nothing for {seconds} s, and computes nothing" if seconds else ""
    )


async def test_time_that_an_ended_process_has_taken_along_need_not_be_made_up_for(times, monkeypatch):
    monkeypatch.setattr(core_health, "_status", lambda process: psutil.STATUS_SLEEPING)
    health = CoreHealth(silent_engine(), [ANY_CORE])
    times.used = 1000.0
    assert times.look(health, 2) == ""
    times.used = 0.0
    assert times.look(health, 100, busy=True) == ""
    assert "answered nothing" in times.look(health, 61)


async def test_a_core_that_waits_for_a_disk_is_busy(times, monkeypatch):
    status = psutil.STATUS_DISK_SLEEP
    monkeypatch.setattr(core_health, "_status", lambda process: status)
    health = CoreHealth(silent_engine(), [ANY_CORE])
    assert times.look(health, 100) == ""
    status = psutil.STATUS_SLEEPING
    assert "answered nothing" in times.look(health, 61)


async def test_where_proc_hides_processes_a_stopped_core_is_noticed_still(core, times, monkeypatch, caplog):
    def hidden(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        raise psutil.AccessDenied(1)

    (process,) = core(sleep_for_ever)
    with monkeypatch.context() as hidepid:
        hidepid.setattr(psutil.Process, "children", hidden)
        health = CoreHealth(silent_engine(), [process])
        assert times.look(health, 100) == ""  # a child may compute
        assert [line for line in caplog.messages if "/proc hides processes" in line] == caplog.messages[:1]
        send(process.pid, signal.SIGSTOP, psutil.STATUS_STOPPED)
        assert "is stopped (by SIGSTOP" in times.look(health, 1)


async def test_a_core_may_wait_while_a_call_changes_it(core, soon):
    engine = Engine()
    engine.answers.clear()
    health = CoreHealth(engine, [core(sleep_for_ever)[0]])
    with health.changing():
        loop = asyncio.get_running_loop()
        start = loop.time()
        await until(lambda: bool(health.problem) or loop.time() > start + 1.5, health)
        assert health.problem == ""
    await until(lambda: "answered nothing" in health.problem, health)


async def test_what_changes_is_logged_once(core, caplog):
    (process,) = core(sleep_for_ever)
    health = CoreHealth(Engine(), [process])
    send(process.pid, signal.SIGSTOP, psutil.STATUS_STOPPED)
    await looks(health)
    send(process.pid, signal.SIGCONT, psutil.STATUS_SLEEPING)
    with caplog.at_level(logging.WARNING):
        await looks(health)
    assert [line[:28] for line in caplog.messages] == ["vgen: the engine is stopped ", "vgen: the engine works again"]


def run_a_core(thread: str, ready) -> None:
    class Core:
        def process_input_sockets(self, how: str) -> None:
            if how == "fail":
                raise ValueError("a request that cannot be decoded")

        def process_output_sockets(self, how: str) -> None:
            self.process_input_sockets(how)

    end_with_socket_threads(Core)
    getattr(Core(), thread)("return")
    ready.send("it goes on after a thread that returns")
    threading.Thread(target=getattr(Core(), thread), args=("fail",)).start()
    sleep_for_ever()


@pytest.mark.parametrize("thread", core_health.SOCKET_THREADS)
def test_a_core_whose_socket_thread_fails_ends_with_it(thread):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_a_core, args=(thread, there))
    process.start()
    assert "goes on" in here.recv()
    process.join(10)
    assert process.exitcode == 1
