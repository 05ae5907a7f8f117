"""Restores the process-wide state that vLLM changes: random states, threads, environment, process group.

With vLLM 0.32 the constructor of `LLM` reseeds `random`, NumPy and torch; on a GPU it sets the precision of float32
matrix products and switches cuDNN's attention off; on a CPU it replaces `torch.set_num_threads` by a function that does
nothing; it adds environment variables; and it creates torch's default process group if there is none. After that every
library in the process takes the training for a distributed one.
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
    """Restore random states, threads, CPU affinity, dtypes, precision and environment variables after the block."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        if torch.cuda.is_initialized():
            stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
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


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Switch cuDNN's attention off within the block. vLLM does so for the whole process, because some models crash."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


class EngineRandomState:
    """The engine's own states of torch's default random generators, from which vLLM samples.

    If trainer and engine shared them, dropout would depend on what was generated, and ranks with equally seeded
    trainers would sample the same completions. And the ranks of one tensor-parallel engine, which must sample the same
    tokens, would sample different ones.
    """

    def __init__(self) -> None:
        self._states = _random_states()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Use the engine's random states within the block, and the trainer's after it."""
        trainer_states = _random_states()
        _set_random_states(self._states)
        try:
            yield
        finally:
            self._states = _random_states()
            _set_random_states(trainer_states)


def _random_states() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_states(states: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])


class ProcessGroup:
    """The default process group that vLLM created for itself; it is torch's default one only while vLLM runs.

    Outside `installed`, torch's default group is the trainer's or none, also if the trainer creates one later. vLLM
    keeps its groups in process-wide variables, so all engines of a process share this object. It is the only state that
    vgen keeps for a process.
    """

    def __init__(self) -> None:
        self._group: Any = None
        """vLLM's default group; None if it has none, or uses the trainer's."""
        self._engines = 0
        """How many engines use vLLM's groups."""

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Count one more engine that uses vLLM's groups, unless the block, which constructs it, raises."""
        others, destroyed = self._engines, self._forget_destroyed_groups()
        self._engines += 1
        try:
            with _groups_protected():
                yield
        except BaseException:
            if others:  # engines of one rank still use these objects, although collectives fail
                vars(_parallel_state()).update(destroyed)
            self.release()
            raise

    def release(self) -> None:
        """Count one engine less. The last one destroys vLLM's groups, but never the trainer's default group."""
        self._engines -= 1
        if self._engines:
            return
        self._forget_destroyed_groups()
        trainer_group = _default_group()
        _set_default_group(self._group)  # vLLM destroys the default group, whichever it is
        try:
            _parallel_state().destroy_model_parallel()
            _parallel_state().destroy_distributed_environment()
        finally:
            self._group = None
            _set_default_group(trainer_group)

    def shut_down(self, engine_core: Any) -> None:
        """Shut an engine core down, but keep the groups that other engines and the trainer use."""
        with self.installed(), _groups_protected():
            engine_core.shutdown()
        self.release()

    def _forget_destroyed_groups(self) -> dict[str, Any]:
        """Remove vLLM's groups from its variables if the trainer has destroyed all groups; returns those variables."""
        module, existing = _parallel_state(), dist.distributed_c10d._world.pg_map
        if self._group not in existing:  # so does an `LLM` that is not vgen's, when it ends
            self._group = None
        if module._WORLD is None or module._WORLD.device_group in existing:
            return {}
        self._group = None
        groups = {name: value for name, value in vars(module).items() if isinstance(value, module.GroupCoordinator)}
        vars(module).update(dict.fromkeys(groups))
        return groups

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make vLLM's group torch's default one within the block."""
        trainer_group = _default_group()
        if trainer_group is not None and self._group is None:
            yield  # vLLM uses the trainer's group
            return
        _set_default_group(self._group)
        try:
            yield
        finally:
            self._group = _default_group()
            _set_default_group(trainer_group)


def _parallel_state() -> Any:
    from vllm.distributed import parallel_state

    return parallel_state


@contextmanager
def _groups_protected() -> Iterator[None]:
    """Keep vLLM from destroying all groups of the process, as it does when an engine core shuts down."""
    core: Any = import_module("vllm.v1.engine.core")
    cleanup = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda *_, **__: None
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = cleanup


def _default_group() -> Any:
    return dist.group.WORLD if dist.is_initialized() else None


def _set_default_group(group: Any) -> None:
    dist.distributed_c10d._update_default_pg(group)


process_group = ProcessGroup()
