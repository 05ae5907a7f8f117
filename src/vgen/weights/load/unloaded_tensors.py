"""Tensors of an engine's model that no loader writes, and that a level-2 sleep discards all the same.

They are small and many, and needed before the first token, so vgen keeps their content and writes it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch

from ..source.address_snapshot import own_tensors, storage_address
from .batched_copy import Pair, copy_groups, group_pairs
from .weight_layout_allowlist import ATTENTION

SMALL_BYTES = 1 << 16
"""A tensor of at most this size is kept on its device: one attention layer alone has several scales."""
MOST_BYTES = 256 << 20
"""The most that all tensors together may have."""


class UnloadedTensors:
    """Tensors and copies of their content: copies of large CUDA tensors in pinned host memory, others where they are.

    Iterating yields `(tensor, content)`.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._pairs = [(tensor, _content(tensor)) for tensor in tensors]
        discarded = [pair for pair in self._pairs if pair[0].is_cuda]  # a sleep does not touch host memory
        self._groups = group_pairs(discarded or self._pairs)

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> Self | None:
        """The tensors and their content; None if they have more than `MOST_BYTES`."""
        tensors = list(tensors)
        return cls(tensors) if sum(map(_bytes, tensors)) <= MOST_BYTES else None

    @classmethod
    def outside_registries(cls, model: torch.nn.Module) -> Self | None:
        """Tensors that modules or their attention backends keep as plain attributes, such as ALiBi's slopes.

        A level-2 sleep discards these too, and vLLM does not restore them. Not included are views of parameters and
        buffers, the KV cache, and what a layer computes from its weights after each loading. None if there is too much.
        """
        registered = {0, *(storage_address(tensor) for _, _, tensor in registered_tensors(model))}
        tensors: dict[int, torch.Tensor] = {}
        for module in model.modules():
            if hasattr(module, "process_weights_after_loading") and type(module).__name__ not in ATTENTION:
                continue
            for holder in (module, getattr(module, "impl", None)):
                for _, tensor in attribute_tensors(holder):
                    if storage_address(tensor) not in registered:
                        tensors.setdefault(id(tensor), tensor.data)
        return cls.of(tensors.values())

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def restore(self) -> None:
        """Write back, on the current stream, what a sleep discards: the CUDA tensors, or all if there are none."""
        copy_groups(self._groups)


def registered_tensors(model: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """All parameters and buffers: the dict in which a module registers each, its full name, and itself."""
    for path, module in model.named_modules():
        for table, name, tensor in own_tensors(module):
            yield table, f"{path}.{name}" if path else name, tensor


def attribute_tensors(holder: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of the plain attributes of an object that are tensors, except the KV cache."""
    for name, value in getattr(holder, "__dict__", {}).items():
        if isinstance(value, torch.Tensor) and name != "kv_cache":
            yield name, value


def _content(tensor: torch.Tensor) -> torch.Tensor:
    if _bytes(tensor) <= SMALL_BYTES or not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
