"""Whether an engine still holds, bit by bit, what a source yields now. Copies nothing."""

from __future__ import annotations

import torch

from ...engine_protocol import Source
from ...errors import WeightSyncError
from ..verification.bit_check import Differences
from .load_record import LoadRecord


@torch.no_grad()
def require_equal(record: LoadRecord, source: Source, receiver: str) -> int:
    """Compare every destination of `record` with its source, in one pass. Returns how many tensors the pass had.

    Raises:
        WeightSyncError: In phase `verify`: a destination differs, or a tensor has another shape or dtype than when it
            was loaded, or is missing.
    """
    different = Differences()
    received = set[str]()
    for name, tensor in source:
        received.add(name)
        layout = tuple(tensor.shape), tensor.dtype
        if record.layouts.get(name, layout) != layout:
            raise _error("its shape or dtype is not that of the last sync: sync the weights first", name, receiver)
        for copy, _ in record.of(name):
            different.compare(record.names[copy.target], copy.place, copy.part.of(tensor))
    for fill in record.fills:
        different.compare(record.names[fill.target], fill.place, fill.place.clone().fill_(fill.value))
    if missing := [name for name in record.copies if name not in received]:
        raise _error("the trainer's model does not provide it any more", missing[0], receiver)
    if names := list(different.names()):
        more = f", as do {len(names) - 1} more ({', '.join(names[1:10])})" if len(names) > 1 else ""
        problem = f"it differs from the trainer's model as that is now{more}: sync the weights if training went on"
        raise _error(problem, names[0], receiver)
    return len(received)


def _error(problem: str, parameter: str, receiver: str) -> WeightSyncError:
    return WeightSyncError(problem, phase="verify", parameter=parameter, receiver=receiver)
