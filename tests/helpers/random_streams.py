"""The trainer's random numbers, which nothing that an engine does may change."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def draw() -> tuple[float, ...]:
    """The next number of each stream of the trainer: `random`, NumPy, torch, and torch on its CUDA device."""
    numbers = random.random(), float(np.random.rand()), float(torch.rand(()))
    return (*numbers, float(torch.rand((), device="cuda"))) if torch.cuda.is_initialized() else numbers


def seed() -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)


def states() -> tuple[Any, ...]:
    """Where each stream is, exactly. NumPy's keys alone would not tell: a draw moves only the position in them."""
    kind, keys, *position = np.random.get_state()
    devices = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else []
    return random.getstate(), kind, keys.tolist(), position, torch.get_rng_state().tolist(), devices


def streams_with(call: Callable[[Callable[[], None]], object]) -> tuple[list[Any], list[Any]]:
    """What a trainer draws without `call`, and with it: before it, whenever `call` calls its argument, and after it."""
    drawn = list[Any]()

    def trainer() -> None:
        drawn.append(draw())

    seed()
    trainer()
    call(trainer)
    trainer()
    drawn.append(states())
    seed()
    return [*(draw() for _ in drawn[:-1]), states()], drawn
