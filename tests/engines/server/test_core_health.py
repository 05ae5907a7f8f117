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


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(core_health, "SILENT_SECONDS", 0.5)


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
