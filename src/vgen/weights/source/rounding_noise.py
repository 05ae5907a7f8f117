"""Rounding errors of a forward pass, simulated: each module's output is multiplied by random factors close to 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

UNITS = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Relative error of one rounding in 16 bits, at most: half the distance from 1 to the next larger number."""
FLOAT32 = 2.0**-20
"""The same for float32: 2⁻²⁴ for one rounding, and more for the sums of a kernel that adds in another order."""
TENSOR_FLOAT32 = 2.0**-11
"""Kernels on CUDA devices multiply float32 with ten bits of the mantissa (TF32)."""


def rounding_unit(dtypes: Iterable[torch.dtype], device_type: str) -> float:
    """The relative rounding error of the coarsest of these dtypes on that kind of device."""
    float32 = FLOAT32 if device_type == "cpu" else TENSOR_FLOAT32
    return max((UNITS.get(dtype, float32) for dtype in dtypes), default=float32)


@contextmanager
def observed_dtypes(model: torch.nn.Module) -> Iterator[set[torch.dtype]]:
    """Collects the dtypes in which modules return their results. Parameters may have others, as under FSDP."""
    dtypes = set[torch.dtype]()

    def observe(value: torch.Tensor) -> torch.Tensor:
        dtypes.add(value.dtype)
        return value

    with _outputs_through(model, observe):
        yield dtypes


@contextmanager
def rounding_noise(model: torch.nn.Module, unit: float, seed: int) -> Iterator[None]:
    """In the block, multiply what each module returns by 1 + unit · N(0, 1), element by element.

    The factors depend on `seed` alone: all ranks of a sharded model, which run the same tokens, get the same ones. The
    random states of torch stay as they are.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(value: torch.Tensor) -> torch.Tensor:
        if (generator := generators.get(value.device)) is None:
            generator = generators[value.device] = torch.Generator(value.device).manual_seed(seed)
        factors = torch.randn(value.shape, generator=generator, device=value.device).mul_(unit).add_(1)
        return (value * factors).to(value.dtype)

    with _outputs_through(model, disturb):
        yield


@contextmanager
def _outputs_through(model: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """In the block, the modules that round return what `change` makes of their floating-point tensors."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def hook(_: torch.nn.Module, __: Any, output: Any) -> Any:
        return type(output)(map(changed, output)) if type(output) in (tuple, list) else changed(output)

    handles = [module.register_forward_hook(hook) for module in _rounding_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose results are rounded.

    Those that compute: with parameters of their own (linear layers, norms, fused experts, routers), or without
    children (activations; FSDP keeps the parameters elsewhere). And the elements of a `ModuleList`, because a block's
    result is added to the residual stream.
    """
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = {block for each in lists for block in each}
    return [
        module
        for module in model.modules()
        if module in blocks or next(module.parameters(recurse=False), None) is not None or not any(module.children())
    ]
