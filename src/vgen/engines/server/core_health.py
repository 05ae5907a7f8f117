"""Whether the engine of a server can work: its processes are there, are not stopped, and answer.

vLLM's `/health` knows only that a process has ended. A core that SIGSTOP has stopped, or that waits for something that
never comes, stays healthy for it, and requests wait for ever.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the processes are looked at."""
SILENT_SECONDS = 60.0
"""A core that has answered nothing for so long, and computed nothing meanwhile, does not work."""
BUSY_SHARE = 0.05
"""A process that computes uses at least so much of one CPU. Idle ones have threads that wake up now and then."""
SOCKET_THREADS = ("process_input_sockets", "process_output_sockets")
"""The methods of vLLM's `EngineCoreProc` that its threads run. Without one of them a core hears or says nothing."""


class CoreHealth:
    """Watches the processes of a server's engine: its cores, with their workers.

    A busy core is no problem, however long a prefill, a compilation or a weight update takes: what is stopped has the
    state `T`, and what waits in vain uses no CPU. `engine` is vLLM's `AsyncLLM`, or anything with its `errored` and
    `is_paused`; `processes` are its cores.
    """

    def __init__(self, engine: Any, processes: Sequence[BaseProcess]) -> None:
        self.problem = ""
        """Why the engine cannot work; empty if it can."""
        self.gone = False
        """Whether a process has ended. The engine will not work again."""
        self._engine, self._processes = engine, processes
        self._tree = [each for process in processes if process.pid is not None for each in _tree(process.pid)]
        self._killed, self._changes = False, 0
        self._question: asyncio.Task[Any] | None = None
        self._since, self._cpu_seconds = 0.0, -1.0
        """When the core was last seen to answer or to compute, and the CPU time that it had used then; -1: not read."""

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within the block a call runs that may make the core wait for others, as for a trainer that sends weights."""
        self._changes += 1
        try:
            yield
        finally:
            self._changes -= 1

    async def watch(self, end: Callable[[], None]) -> None:
        """Keep `problem` up to date until the engine is gone, then log the reason and call `end`."""
        try:
            while not self.gone:
                self.look()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            if self._question is not None:
                self._question.cancel()
        # `ServerProcess.death` takes the last error in the log for the cause. What was killed has logged none.
        logger.error("EngineError: %s" if self._killed else "vgen: %s", self.problem)
        end()

    def look(self) -> None:
        """Look at the processes now."""
        before = self.problem
        if ended := [process for process in self._processes if process.exitcode is not None]:
            ended.sort(key=lambda process: not process.exitcode)  # vLLM ends the others when one has failed
            self.problem = f"the engine's core has ended: {', '.join(map(_end_of, ended))}"
            self.gone, self._killed = True, (ended[0].exitcode or 0) < 0
        elif self._engine.errored:
            dead = [each.pid for each in self._tree if _status(each) in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE)]
            self.problem = "the engine has failed" + (f": process {_list(dead)} has ended" if dead else "")
            self.gone, self._killed = True, bool(dead)
        elif stopped := [each.pid for each in self._tree if _status(each) == psutil.STATUS_STOPPED]:
            self.problem = f"the engine is stopped (by SIGSTOP; SIGCONT lets it go on): process {_list(stopped)}"
        elif (silent := self._silent_seconds()) >= SILENT_SECONDS:
            self.problem = f"the engine's core has answered nothing for {silent:.0f} s, and computes nothing"
        else:
            self.problem = ""
        if self.problem != before and not self.gone:
            logger.warning("vgen: %s", self.problem or "the engine works again")

    def _silent_seconds(self) -> float:
        """For how long the core has neither answered nor computed."""
        now, answered = time.monotonic(), self._question is None or self._question.done()
        if answered:
            self._question = asyncio.create_task(self._ask())
        if answered or self._changes or not self._tree:
            self._since, self._cpu_seconds = now, -1.0
            return 0.0
        alive = [each for process in self._processes if process.pid is not None for each in _tree(process.pid)]
        used = sum(sum(_cpu_times(each)[:4]) for each in alive)
        # On an overloaded machine, a process that is ready to run gets no CPU.
        ready = any(_status(each) == psutil.STATUS_RUNNING for each in alive)
        if ready or used - self._cpu_seconds > BUSY_SHARE * (now - self._since):
            self._since, self._cpu_seconds = now, used
        return now - self._since

    async def _ask(self) -> None:
        with suppress(Exception):  # an error is an answer, too
            await self._engine.is_paused()


def watched(app: Any) -> CoreHealth:
    """The health of the engine that a vLLM application serves: its cores are this process's children."""
    return CoreHealth(app.state.engine_client, multiprocessing.active_children())


def end_with_socket_threads(core: type[Any]) -> None:
    """Have each of vLLM's cores (`EngineCoreProc`) end when one of its socket threads has failed.

    Such a core runs on, and is healthy for vLLM, but hears no request or answers none.
    """
    for name in SOCKET_THREADS:
        setattr(core, name, _fatal(getattr(core, name)))


def _fatal(run: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(run)
    def run_or_end(*args: Any, **kwargs: Any) -> None:
        try:
            run(*args, **kwargs)
        except Exception:
            logger.exception("vgen: the thread of the engine's core for %s has failed", run.__name__)
            os._exit(1)

    return run_or_end


def _tree(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _status(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.status()
    return psutil.STATUS_DEAD


def _cpu_times(process: psutil.Process) -> Sequence[float]:
    """Seconds of this process, then of its ended children (compilers, say), each in user and in system mode."""
    with suppress(psutil.Error):
        return process.cpu_times()
    return ()


def _list(pids: Sequence[int]) -> str:
    return ", ".join(map(str, pids))


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"{process.name} (PID {process.pid}) {how}"
