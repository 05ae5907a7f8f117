"""A source of weights that a test can change on their way to the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vgen.weights.source.module_source import ModuleSource

Change = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Gets a tensor and its name, and returns the tensors to send instead of it: none, one or more. It may raise."""


class ChangedSource(ModuleSource):
    """The weights of a model. Within `changed_by(change)`, every tensor passes through `change` first.

    source = ChangedSource(model)
    generation = ColocateGeneration(source)
    with source.changed_by(lambda name, tensor: [(name, tensor * 2)]):
        generation.sync_weights()
    """

    change: Change | None = None

    @contextmanager
    def changed_by(self, change: Change | None) -> Iterator[None]:
        self.change = change
        try:
            yield
        finally:
            self.change = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return super().__iter__() if self.change is None else self._changed(self.change)

    def _changed(self, change: Change) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().__iter__():
            yield from change(name, tensor)

    def address_snapshot(self) -> Any:
        # An engine that reads the model's own memory would not see the change.
        return None if self.change is not None else super().address_snapshot()


def one_wrong(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A change: one weight gets other values."""
    return [(name, tensor + 0.3 if name == "model.layers.1.mlp.down_proj.weight" else tensor)]


def lost(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A change: the pass raises `OSError` at its first tensor."""
    raise OSError("lost")
