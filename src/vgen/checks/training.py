"""What training does to weights, for checks: every parameter gets other values of the same size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def randomize(model: Any, seed: int) -> None:
    """Give a fresh model weights as if it were trained: matrices scaled by their fan-in, norms and biases in use.

    With the initial weights of transformers (standard deviation 0.02) the log-probabilities of all tokens are nearly
    the same, and a stale weight would hardly be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() <= 1 or "A_log" in name:
            parameter.add_((0.2 * noise).to(parameter))
        else:
            parameter.copy_((noise * (0.6 / parameter.shape[-1] ** 0.5)).to(parameter))


@torch.no_grad()
def train(model: Any, seed: int, strength: float, which: Callable[[str], bool] = lambda name: True) -> int:
    """Change the parameters whose names `which` accepts; returns how many.

    A matrix keeps its standard deviation: `strength` is the share of it that is new. To a vector `strength / 5` times
    normal noise is added. The same seed gives the same changes.
    """
    generator, changed = torch.Generator().manual_seed(seed), 0
    for name, parameter in model.named_parameters():
        if not (parameter.is_floating_point() and which(name)):
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        value = parameter.float()
        if parameter.dim() <= 1 or "A_log" in name:
            value = value + 0.2 * strength * noise
        else:
            # For a matrix of zeros, such as a fresh adapter's, the size is that of a fan-in initialization.
            size = float(value.std()) if bool(value.any()) and value.numel() > 1 else 0.6 / value.shape[-1] ** 0.5
            value = (1 - strength**2) ** 0.5 * value + strength * size * noise
        parameter.copy_(value.to(parameter.dtype))
        changed += 1
    return changed
