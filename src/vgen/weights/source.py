"""The trainer's model as a re-iterable stream of `(checkpoint name, full tensor)`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import WeightSyncError
from .names import checkpoint_name

if TYPE_CHECKING:
    import torch


class ModuleSource:
    """All parameters of a plain module, each time it is iterated.

    A tied weight comes once under each of its names: an engine that has untied its output head would
    keep the old one otherwise, without a word.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.bytes = 0
        """Sent in the last pass, with `tensors`."""
        self.tensors = 0
        self.seconds = 0.0
        """Spent in the last pass on getting the tensors, apart from what their receiver did with them."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.bytes, self.tensors, self.seconds = 0, 0, 0.0
        start = time.monotonic()
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if _held_elsewhere(parameter):
                raise WeightSyncError(
                    "it is sharded or not materialized, and a plain module is needed",
                    phase="gather",
                    parameter=checkpoint_name(name),
                    receiver="trainer",
                )
            tensor = parameter.detach()
            self.bytes += tensor.numel() * tensor.element_size()
            self.tensors += 1
            self.seconds += time.monotonic() - start
            yield checkpoint_name(name), tensor
            start = time.monotonic()
        self.seconds += time.monotonic() - start


def _held_elsewhere(parameter: torch.Tensor) -> bool:
    return parameter.is_meta or hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")
