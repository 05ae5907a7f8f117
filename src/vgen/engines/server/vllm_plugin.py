"""vgen's plugin for vLLM. vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import functools
import os

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from ...weights.transports.shared_memory import BACKEND
from ..cpu_seeds import keep_seeds
from .parent_watchdog import LAUNCHER_VARIABLE, follow_parent
from .weight_receiver import VgenEngine
from .weight_sender import SharedMemorySender


def register() -> None:
    """Add vgen's engine to vLLM's registries in this process. May be called any number of times."""
    follow_parent()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, VgenEngine)
    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(BACKEND, SharedMemorySender)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # Without this, the first bf16 matrix product ends the process with an illegal instruction.
        torch.cpu._init_amx()  # pyright: ignore[reportPrivateUsage]
        _mend_seeds()
    if LAUNCHER_VARIABLE in os.environ:
        _end_cores()


@functools.cache
def _end_cores() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    from .core_health import end_with_socket_threads

    end_with_socket_threads(EngineCoreProc)


@functools.cache
def _mend_seeds() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    keep_seeds(CPUModelRunner)
