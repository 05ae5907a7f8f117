"""Whether the engine of a server can work: its processes are there, are not stopped, and answer.

vLLM's `/health` knows only that a process has ended. A core that SIGSTOP has stopped, or that waits for something that
never comes, stays healthy for it, and requests wait for ever.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

from .server_facts import attribute

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the processes are looked at."""
SILENT_SECONDS = 60.0
"""A core on a CPU that has answered nothing for so long, and computed nothing meanwhile, does not work."""
DEVICE_SILENT_SECONDS = 600.0
"""The same on other devices. A core sleeps while its GPU computes a long step."""
SILENT_VARIABLE = "VGEN_SILENT_SECONDS"
"""The environment variable that replaces both; 0 means for ever."""
BUSY_SHARE = 0.05
"""A process that computes uses at least so much of one CPU. Idle ones have threads that wake up now and then."""
SOCKET_THREADS = ("process_input_sockets", "process_output_sockets")
"""The methods of vLLM's `EngineCoreProc` that its threads run. Without one of them a core hears or says nothing."""


class CoreHealth:
    """Watches the processes of a server's engine: its cores, with their workers.

    A busy core is no problem, however long a prefill, a compilation or a weight update takes: what is stopped has the
    state `T`, and what waits in vain uses no CPU. A GPU's work is not seen, nor is that of another host, so silence
    means less or nothing there (see `_silent_limit`). `engine` is vLLM's `AsyncLLM`, or anything with its `errored` and
    `is_paused`; `processes` are its cores.
    """

    def __init__(self, engine: Any, processes: Sequence[BaseProcess]) -> None:
        self.problem = ""
        """Why the engine cannot work; empty if it can."""
        self.gone = False
        """Whether a process has ended. The engine will not work again."""
        self._engine, self._processes = engine, processes
        self._limit = _silent_limit(engine)
        self._tree = self._alive()
        self._killed, self._wanted, self._changes = False, False, 0
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
        if self._wanted:
            logger.warning("vgen: %s", self.problem)
        else:
            # `ServerProcess.death` takes the last error in the log for the cause. What was killed has logged none.
            logger.error("EngineError: %s" if self._killed else "vgen: %s", self.problem)
        end()

    def look(self) -> None:
        """Look at the processes now."""
        before, gone = self.problem, self.gone
        self.problem = self._end_of_core() or self._end_of_engine() or self._standstill()
        if self.gone and not gone:
            self._wanted = self._stopping()
        if self.problem != before and not self.gone:
            logger.warning("vgen: %s", self.problem or "the engine works again")

    def _end_of_core(self) -> str:
        ended = [process for process in self._processes if process.exitcode is not None]
        ended.sort(key=lambda process: not process.exitcode)  # vLLM ends the others when one has failed
        if not ended or not (ended[0].exitcode or self._engine.errored or not self._may_end(len(ended))):
            return ""
        self.gone, self._killed = True, (ended[0].exitcode or 0) < 0
        return f"the engine's core has ended: {', '.join(map(_end_of, ended))}"

    def _end_of_engine(self) -> str:
        if not self._engine.errored:
            return ""
        dead = [each.pid for each in self._tree if _status(each) in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE)]
        self.gone, self._killed = True, bool(dead)
        return "the engine has failed" + (f": process {_list(dead)} has ended" if dead else "")

    def _standstill(self) -> str:
        if stopped := [each.pid for each in self._tree if _status(each) == psutil.STATUS_STOPPED]:
            return f"the engine is stopped (by SIGSTOP; SIGCONT lets it go on): process {_list(stopped)}"
        if (silent := self._silent_seconds()) >= self._limit:
            return f"the engine's core has answered nothing for {silent:.0f} s, and computes nothing"
        return ""

    def _may_end(self, number: int) -> bool:
        """Whether so many cores may have ended with status 0: data-parallel ones do, each when it has no more work."""
        return number < len(self._processes) or self._stopping()

    def _stopping(self) -> bool:
        """Whether vLLM ends its cores because it was asked to, as far as it tells, and not because one has failed."""
        manager = attribute(self._engine, "engine_core.resources.engine_manager")
        stopped = attribute(manager, "manager_stopped.is_set")
        return stopped is not None and stopped() and getattr(manager, "failed_proc_name", "unknown") is None

    def _alive(self) -> list[psutil.Process]:
        """The cores and their children."""
        found: list[psutil.Process] = []
        for pid in [process.pid for process in self._processes if process.pid is not None]:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
                try:
                    found += found[-1].children(recursive=True)
                except psutil.AccessDenied:  # /proc is mounted with hidepid
                    if self._limit < math.inf:
                        logger.warning("vgen: /proc hides processes: only a core that is stopped or ends is noticed")
                    self._limit = math.inf
        return found

    def _silent_seconds(self) -> float:
        """For how long the core has neither answered nor computed."""
        now, answered = time.monotonic(), self._question is None or self._question.done()
        if answered:
            self._question = asyncio.create_task(self._ask())
        if answered or self._changes or not self._tree or self._limit == math.inf:
            self._since, self._cpu_seconds = now, -1.0
            return 0.0
        alive = self._alive()
        used = sum(sum(_cpu_times(each)[:4]) for each in alive)
        # On an overloaded machine, a process that is ready to run gets no CPU, and one that reads a disk waits.
        ready = any(_status(each) in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP) for each in alive)
        more = used - self._cpu_seconds  # negative if a process has ended and taken its time along
        if ready or more < 0 or more > BUSY_SHARE * (now - self._since):
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


def _silent_limit(engine: Any) -> float:
    """After how many seconds of silence this engine does not work; infinite where its silence means nothing."""
    parallel = attribute(engine, "vllm_config.parallel_config")
    ranks = attribute(parallel, "data_parallel_size") or 1
    elsewhere = (
        attribute(parallel, "use_ray")
        or "ray" in (attribute(parallel, "distributed_executor_backend"), attribute(parallel, "data_parallel_backend"))
        or (attribute(parallel, "nnodes") or 1) > 1
        or (attribute(parallel, "data_parallel_size_local") or ranks) < ranks
    )
    if elsewhere:
        return math.inf
    on_cpu = attribute(engine, "vllm_config.device_config.device_type") == "cpu"
    limit = SILENT_SECONDS if on_cpu else DEVICE_SILENT_SECONDS
    if wanted := os.environ.get(SILENT_VARIABLE):
        try:
            limit = float(wanted)
        except ValueError:
            logger.warning("vgen: %s must be a number of seconds, not %r: %g is used", SILENT_VARIABLE, wanted, limit)
    return limit if limit > 0 else math.inf


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
