"""What no loader writes, and a level-2 sleep discards all the same: small, many, and wanted before the first token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .mover import Pair, copy_groups, grouped

SMALL = 1 << 16
"""Up to so many bytes a tensor's content stays on its device: an attention layer alone has several scales."""
MOST = 256 << 20
"""Of all together."""


class Kept:
    """Tensors and their content as it is now, of the larger ones on the host."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._pairs = [(tensor, _content(tensor)) for tensor in tensors]
        discarded = [pair for pair in self._pairs if pair[0].is_cuda]  # a sleep leaves host memory as it is
        self._groups = grouped(discarded or self._pairs)

    def __iter__(self) -> Iterator[Pair]:
        """Each tensor and its content."""
        return iter(self._pairs)

    def restore(self) -> None:
        """Write back, on the current stream, what a sleep discards: on the device, or all where none is there."""
        copy_groups(self._groups)


def kept_of(tensors: Iterable[torch.Tensor]) -> Kept | None:
    """None where they have more than `MOST` bytes."""
    tensors = list(tensors)
    return Kept(tensors) if sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= MOST else None


def _content(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() * tensor.element_size() <= SMALL or not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
