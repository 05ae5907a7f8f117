"""What no loader writes, and a level-2 sleep discards all the same: small, many, and wanted before the first token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .buckets import aligned
from .mover import copy_together


class Kept:
    """The content of `tensors` on the host, in one piece: a layer has several, and the device waits for all of them."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        sizes = [tensor.numel() * tensor.element_size() for tensor in self._tensors]
        self._offsets = [sum(map(aligned, sizes[:index])) for index in range(len(sizes))]
        on_gpu = any(tensor.is_cuda for tensor in self._tensors)
        self._host = torch.empty(sum(map(aligned, sizes)), dtype=torch.uint8, pin_memory=on_gpu)
        for content, tensor in zip(self._contents(self._host), self._tensors, strict=True):
            content.copy_(tensor)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each tensor and its content."""
        return zip(self._tensors, self._contents(self._host), strict=True)

    def restore(self) -> None:
        """Write it back, on the current stream."""
        there = {
            device: self._host.to(device, non_blocking=True) for device in {tensor.device for tensor in self._tensors}
        }
        contents = {device: self._contents(flat) for device, flat in there.items()}
        copy_together([(tensor, contents[tensor.device][index]) for index, tensor in enumerate(self._tensors)])

    def _contents(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [
            flat[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            for offset, tensor in zip(self._offsets, self._tensors, strict=True)
        ]
