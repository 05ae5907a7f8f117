"""A server's worker that loads buckets from shared memory, and weights to send to it."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable, Iterator
from math import prod

import torch


class Worker:
    """Maps what it is told of and copies the tensors out, each bucket after `before_load`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.raises: dict[str, Exception] = {}
        self.sizes: list[int] = []
        self.before_load: Callable[[], object] = lambda: None
        self.modes: set[int] = set()
        self.paths: set[str] = set()
        """Of the buckets that it was last told of."""
        self._files: dict[str, int] = {}

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._called("init")
        self.paths = set(init_info["paths"])
        for path in init_info["paths"]:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDWR)
                self.modes.add(stat.S_IMODE(os.stat(path).st_mode))

    def start_weight_update(self) -> None:
        self._called("start")
        self.weights = {}

    def update_weights(self, update_info: dict) -> None:
        self._called("abort" if update_info.get("abort") else "last" if update_info["last"] else "update")
        if update_info.get("abort"):
            return
        self.before_load()
        file = self._files[update_info["path"]]
        memory = mmap.mmap(file, os.fstat(file).st_size)
        self.sizes.append(sum(prod(shape) * getattr(torch, t).itemsize for _, t, shape, _ in update_info["tensors"]))
        for name, dtype, shape, offset in update_info["tensors"]:
            count = prod(shape) * getattr(torch, dtype).itemsize
            flat = torch.frombuffer(bytearray(memory[offset : offset + count] or b"\0"), dtype=torch.uint8)[:count]
            self.weights[name] = flat.clone().view(getattr(torch, dtype)).view(shape)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._called(f"finish {weight_version}")

    def forget(self) -> None:
        self._files.clear()

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if error := self.raises.pop(call, None):
            raise error


class Weights:
    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()


def same(worker: Worker, weights: Weights) -> bool:
    return worker.weights.keys() == weights.tensors.keys() and all(
        torch.equal(worker.weights[name], tensor) and worker.weights[name].dtype == tensor.dtype
        for name, tensor in weights.tensors.items()
    )


def numbers(count: int, size: int = 1000) -> Weights:
    return Weights(**{f"w{i}": torch.randn(size) for i in range(count)})
