"""Whether an engine's reload replaces all that its kernels read, whatever layout they keep it in.

A reload can drop what the loader handed over, and kernels can hold tensors that no module registers. So the engine
reloads random weights twice, and every parameter is compared, block by block, before and after: blocks that hold the
same bits under both kinds of weights were not loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...engine_protocol import TensorMetadata
from .layerwise_reload import NamedStream, reload
from .load_audit import LoadAudit
from .load_observer import SCALES
from .random_weights import RandomWeights
from .tensor_accounting import is_dense

BLOCK = 256
"""Bytes of a block. Random weights, also of 8 bits, never agree in a whole block of this size."""
LARGER = 3.0
"""How much larger the second weights are: scales that are powers of two are then others too."""
MOST_UNCHANGED = 0.02
"""The share of a tensor's blocks that may stay unchanged, beside the constants: the padding of a kernel's tiles."""


@torch.no_grad()
def unchanged_by_reload(runner: Any, metadata: TensorMetadata, audit: LoadAudit) -> list[str]:
    """The parameters of which parts stay as they are when the engine reloads other weights.

    Afterwards the engine holds random weights. Raises what the reload raises.
    """
    model = runner.get_model()
    names = [entry for entry in metadata if entry[0] not in audit.nameless]
    device = next(model.parameters()).device
    checksums: list[dict[str, torch.Tensor]] = []
    for offset, factor in ((0, 1.0), (len(names), LARGER)):
        seeds = {name: offset + index for index, (name, *_) in enumerate(names)}
        reload(runner, NamedStream(_scaled(RandomWeights(names, device, seeds), factor)))
        checksums.append({name: _block_sums(tensor) for name, tensor in model.named_parameters() if _loadable(name)})
    first, second = checksums
    loaded = _loaded_shares(model, audit)
    return [
        name
        for name in first
        if name in second and _is_stale(first[name], second[name], loaded.get(name, 1.0), audit.skipped)
    ]


def _loaded_shares(model: torch.nn.Module, audit: LoadAudit) -> dict[str, float]:
    """The shares of parameters that a loader writes, of the tensors as kernels keep them.

    A kernel may pad them, as CUTLASS pads the rows of fp8 matrices to a multiple of 16: zeros after every reload.
    """
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    shares: dict[str, float] = {}
    for path, module in model.named_modules():
        info: Any = LAYERWISE_INFO.get(module)
        for name, tensor in module.named_parameters(recurse=False):
            constructed = info.restore_metadata[0].get(name) if info else None
            padded = tensor.numel() / constructed.numel() if constructed is not None and constructed.numel() else 1.0
            whole = f"{path}.{name}" if path else name
            shares[whole] = audit.loaded.get(whole, 1.0) / max(1.0, padded)  # packed formats have fewer elements
    return shares


def _scaled(weights: RandomWeights, factor: float) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        scalable = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        yield name, tensor * factor if scalable else tensor


def _is_stale(first: torch.Tensor, second: torch.Tensor, loaded: float, unaudited: str) -> bool:
    """Whether more stayed unchanged than the constants, which no audit counts if there was none."""
    unchanged = _share_unchanged(first, second)
    return unchanged == 1 if unaudited else unchanged > 1 - loaded + MOST_UNCHANGED


def _loadable(name: str) -> bool:
    return name.rpartition(".")[2] not in SCALES


def _block_sums(tensor: torch.Tensor) -> torch.Tensor:
    """A number for each block of the tensor's memory; for less than a block, one number. Empty if it has gaps."""
    data = tensor.detach()
    if data.device.type == "meta" or not data.numel() or not is_dense(data):
        return torch.empty(0)
    data = data.as_strided((data.numel(),), (1,)).view(torch.uint8)
    if data.numel() < BLOCK:  # plain sums of few bytes agree by chance: each byte has its own large odd weight
        weights = torch.arange(1, data.numel() + 1, device=data.device) * 0x9E3779B97F4A7C1 | 1
        return (data.to(torch.int64) * weights).sum().reshape(1)
    data = data if int(data.storage_offset()) % 4 == 0 else data.clone()
    return data[: data.numel() // BLOCK * BLOCK].view(-1, BLOCK).view(torch.int32).sum(dim=1)


def _share_unchanged(first: torch.Tensor, second: torch.Tensor) -> float:
    if first.shape != second.shape or not first.numel():
        return 0.0
    return float((first == second).double().mean())
