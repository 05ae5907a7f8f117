"""Weights as a checkpoint folder that a stock server reloads by itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1 << 30


def write_checkpoint(weights: Iterable[tuple[str, torch.Tensor]], folder: str | Path) -> None:
    """Write the stream as safetensors files of about a gigabyte. No more than one file's tensors are held at a time."""
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    size = written = 0

    def flush() -> None:
        nonlocal size, written
        if shard:
            save_file(shard, str(Path(folder, f"model-{written:05d}.safetensors")))
            written, size = written + 1, 0
            shard.clear()

    for name, tensor in weights:
        shard[name] = tensor.detach().cpu().clone()  # tied tensors must not share memory in a file
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            flush()
    flush()
