"""Weights as a checkpoint folder, which a server reloads by itself. Any server in development mode can do that."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine_protocol import Source
from ...profiling import semconv
from .weight_transport import TransportEndpoint, TransportSettings, WeightTransport, WeightUpdate

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1 << 30


class CheckpointTransport(WeightTransport):
    """Writes the weights into a folder that the servers can read, and has them reload it.

    The folder is written before the servers are paused, and removed after they have loaded it.
    """

    name, serves = "checkpoint", "servers without vgen's plugin reload from a folder"
    reloads = True

    def __init__(self, settings: TransportSettings) -> None:
        self._parent = settings.folder
        self._folders: list[str] = []

    def supports(self, endpoint: TransportEndpoint, source: Source | None) -> str | None:
        return None

    @contextmanager
    def prepared(self, update: WeightUpdate) -> Generator[None]:
        with ExitStack() as stack:
            with update.trace.phase("transfer") as span:
                self._folders = []
                for weights in [update.source] if update.random is None else [update.random, update.source]:
                    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vgen-weights-", dir=self._parent))
                    write_checkpoint(weights, folder)
                    self._folders.append(folder)
                span.set({semconv.GATHER_SECONDS: update.source.seconds})
            yield

    def send(self, update: WeightUpdate) -> None:
        with update.trace.phase("load"):
            for folder in self._folders:
                self._group.reload_checkpoint(folder)
            self._group.set_version(update.version)


def write_checkpoint(weights: Iterable[tuple[str, torch.Tensor]], folder: str | Path) -> None:
    """Write the tensors as safetensors files of about a gigabyte. Memory holds the tensors of one file at a time."""
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    size = files = 0

    def flush() -> None:
        nonlocal size, files
        if shard:
            save_file(shard, str(Path(folder, f"model-{files:05d}.safetensors")))
            files, size = files + 1, 0
            shard.clear()

    for name, tensor in weights:
        shard[name] = tensor.detach().cpu().clone()  # safetensors refuses tensors that share memory, as tied ones do
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            flush()
    flush()
