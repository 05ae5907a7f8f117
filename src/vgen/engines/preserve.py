"""Keeps vLLM from changing the process that it is constructed in.

Seen with vLLM 0.32: constructing `LLM` reseeds `random`, NumPy and torch; on a CPU it replaces
`torch.set_num_threads` by a function that does nothing; it adds to the environment; and it creates
torch's default process group where there was none, after which every library in the process believes
that the training is distributed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Put random states, threads, affinity, default dtype and the environment back as they were."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        if torch.cuda.is_initialized():
            stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        affinity = os.sched_getaffinity(0)
        environment = dict(os.environ)
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            os.sched_setaffinity(0, affinity)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


class Randomness:
    """torch's random numbers for the engine alone.

    vLLM samples from torch's default generators. Shared with the trainer they would tie dropout to what
    was generated; ranks whose trainers are seeded alike would sample alike, and the ranks of one
    tensor-parallel engine, which must sample alike, would not.
    """

    def __init__(self) -> None:
        self._states = _random_states()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The engine's random states within the block, the trainer's outside."""
        trainers = _random_states()
        _set_random_states(self._states)
        try:
            yield
        finally:
            self._states = _random_states()
            _set_random_states(trainers)


def _random_states() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_states(states: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])


class ProcessGroup:
    """The default process group that vLLM made for itself, put in place only while vLLM is at work.

    Outside `installed`, torch's default group is the trainer's own, or none, also when the trainer
    creates one later. vLLM keeps its groups in process-wide variables, so all engines of a process share
    this one; it is the only state that vgen keeps for a process.
    """

    def __init__(self) -> None:
        self._own: Any = None
        self._engines = 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """One more engine depends on vLLM's groups from here on, unless the block raises."""
        others, lost = self._engines, self._take_lost()
        self._engines += 1
        try:
            with _groups_kept():
                yield
        except BaseException:
            if others:  # what is lost to collectives still serves engines of one rank
                vars(_parallel_state()).update(lost)
            self.release()
            raise

    def release(self) -> None:
        """One engine less. The last one takes vLLM's groups along, but never the trainer's default group."""
        self._engines -= 1
        if self._engines:
            return
        self._take_lost()
        trainers = dist.group.WORLD if dist.is_initialized() else None
        _set_default(self._own)  # vLLM destroys whichever is the default one
        try:
            _parallel_state().destroy_model_parallel()
            _parallel_state().destroy_distributed_environment()
        finally:
            self._own = None
            _set_default(trainers)

    def shut_down(self, engine_core: Any) -> None:
        """Shut an engine core down without its taking along what other engines and the trainer need."""
        with self.installed(), _groups_kept():
            engine_core.shutdown()
        self.release()

    def _take_lost(self) -> dict[str, Any]:
        """Remove vLLM's groups from its variables if the trainer has destroyed them together with its own."""
        module = _parallel_state()
        if module._WORLD is None or module._WORLD.device_group in dist.distributed_c10d._world.pg_map:
            return {}
        self._own = None
        lost = {name: value for name, value in vars(module).items() if isinstance(value, module.GroupCoordinator)}
        vars(module).update(dict.fromkeys(lost))
        return lost

    @contextmanager
    def installed(self) -> Iterator[None]:
        """vLLM's group is the default one within the block."""
        trainers = dist.group.WORLD if dist.is_initialized() else None
        if trainers is not None and self._own is None:
            yield  # vLLM works within the trainer's group
            return
        _set_default(self._own)
        try:
            yield
        finally:
            self._own = dist.group.WORLD if dist.is_initialized() else None
            _set_default(trainers)


def _parallel_state() -> Any:
    from vllm.distributed import parallel_state

    return parallel_state


@contextmanager
def _groups_kept() -> Iterator[None]:
    """Shutting an engine core down would destroy the groups of every other engine, and the trainer's, too."""
    core: Any = import_module("vllm.v1.engine.core")
    cleanup = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda *_, **__: None
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = cleanup


def _set_default(group: Any) -> None:
    dist.distributed_c10d._update_default_pg(group)


process_group = ProcessGroup()
