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
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@contextmanager
def trainer_state() -> Iterator[None]:
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


class ProcessGroup:
    """The default process group that vLLM made for itself, put in place only while vLLM is at work.

    Outside `installed`, torch's default group is the trainer's own, or none, also when the trainer
    creates one later. vLLM keeps its groups in process-wide variables, so all engines of a process share
    this one; it is the only state that vgen keeps for a process.
    """

    def __init__(self) -> None:
        self._own: Any = None

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


def _set_default(group: Any) -> None:
    dist.distributed_c10d._update_default_pg(group)


process_group = ProcessGroup()
