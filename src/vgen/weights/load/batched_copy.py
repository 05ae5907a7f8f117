"""Many copies between tensors that keep their addresses, at the speed of the memory of one CUDA device."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

from ..verification.bit_check import Differences
from .tensor_accounting import runs

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A destination and the value to copy there."""
Group: TypeAlias = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Destinations and their values; all destinations have one dtype and device, and so have all values."""
Move: TypeAlias = tuple[int, int, int]
"""Destination address, source address and bytes."""

LEAST_RUN = 512
"""Rows with fewer bytes than this are left to torch."""
AHEAD = 8
"""How many of the copies, the largest, can be started before the addresses of the others are checked."""

_log = logging.getLogger(__name__)


def copy_pairs(pairs: Iterable[Pair]) -> None:
    """Copy each value of `(place, value)` into its place, those of the same dtypes and devices in one call."""
    copy_groups(group_pairs(pairs))


def group_pairs(pairs: Iterable[Pair]) -> list[Group]:
    """The pairs in groups that one call copies."""
    groups: dict[Any, Group] = {}
    for place, value in pairs:
        places, values = groups.setdefault((place.dtype, value.dtype, place.device, value.device), ([], []))
        places.append(place)
        values.append(value)
    return list(groups.values())


def copy_groups(groups: list[Group]) -> None:
    """Copy the groups that `group_pairs` made, on the current stream."""
    for places, values in groups:
        torch._foreach_copy_(places, values, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]


def batched_copy_of(pairs: list[Pair]) -> BatchedCopy | None:
    """Copy `pairs` by a `BatchedCopy` and verify the result; None if torch's own calls must be used instead.

    That is so if a tensor is not on the one CUDA device, or if the kernel fails or copies wrongly, which is logged.
    """
    device = pairs[0][0].device
    if any(tensor.device != device or not tensor.is_cuda for pair in pairs for tensor in pair):
        return None
    try:
        batched = BatchedCopy(pairs)
        batched.run()
        differences = Differences()
        for index, (place, value) in enumerate(pairs):
            differences.compare(str(index), place, value)
        if not differences.names():
            return batched
        _log.error("the weight copy kernel copied wrong bytes; it is not used")
    except Exception as error:
        _log.warning("the weight copy kernel cannot be used: %s: %s", type(error).__name__, error)
    return None


def moves_of(pairs: list[Pair]) -> tuple[list[Move], list[Pair]]:
    """The pairs as moves of bytes, adjacent moves between the same two storages joined; and the pairs that are none.

    A pair is no move if its two sides have different dtypes, or rows shorter than `LEAST_RUN`.
    """
    moves: list[tuple[int, int, int, int, int]] = []
    others: list[Pair] = []
    for place, value in pairs:
        pieces = _moves_of_pair(place, value)
        if pieces is None:
            others.append((place, value))
            continue
        storages = place.untyped_storage().data_ptr(), value.untyped_storage().data_ptr()
        moves += [(*storages, *piece) for piece in pieces]
    moves.sort(key=lambda move: move[2])
    joined: list[tuple[int, int, int, int, int]] = []
    for move in moves:
        if joined:
            last = joined[-1]
            if move[:4] == (last[0], last[1], last[2] + last[4], last[3] + last[4]):
                joined[-1] = (*last[:4], last[4] + move[4])
                continue
        joined.append(move)
    return [move[2:] for move in joined], others


def _moves_of_pair(place: torch.Tensor, value: torch.Tensor) -> list[Move] | None:
    if place.dtype != value.dtype:
        return None
    size = place.numel() * place.element_size()
    if place.is_contiguous() and value.is_contiguous():
        return [(place.data_ptr(), value.data_ptr(), size)] if size else []
    (to, to_size), (of, of_size) = runs(place), runs(value)
    length = min(to_size, of_size)
    if length < LEAST_RUN or to_size % length or of_size % length:
        return None
    return list(zip(_split(to, to_size, length), _split(of, of_size, length), [length] * (size // length), strict=True))


def _split(starts: torch.Tensor, size: int, length: int) -> list[int]:
    return (starts[:, None] + torch.arange(0, size, length)).flatten().tolist()


class BatchedCopy:
    """The same copies each time it runs: kernel launches over tables of moves, and torch's copies, in two CUDA graphs.

    `start` launches the largest copies, `finish` the others. It holds addresses and keeps no tensor alive.
    """

    how = "kernel"
    """The name of this way to copy, for telemetry."""

    def __init__(self, pairs: list[Pair]) -> None:
        by_size = sorted(pairs, key=lambda pair: pair[0].numel() * pair[0].element_size(), reverse=True)
        ahead = min(AHEAD, len(pairs) // 2)
        self.largest = {tensor.untyped_storage().data_ptr() for pair in by_size[:ahead] for tensor in pair}
        """The addresses of the storages, of both sides, that `start` reads and writes."""
        self._ahead, self._others = _Graph(by_size[:ahead]), _Graph(by_size[ahead:])

    def start(self) -> None:
        """Launch the largest copies on the current stream."""
        self._ahead.run()

    def finish(self) -> None:
        """Launch the other copies on the current stream."""
        self._others.run()

    def run(self) -> None:
        """Launch all copies on the current stream."""
        self.start()
        self.finish()


class _Graph:
    """One CUDA graph of the kernel launches for a table of moves, and of torch's own copies."""

    def __init__(self, pairs: list[Pair]) -> None:
        from .copy_kernel import MoveTable

        self._graph: torch.cuda.CUDAGraph | None = None
        if not pairs:
            return
        moves, others = moves_of(pairs)
        self._table = MoveTable(moves, pairs[0][0].device)  # kept alive: the graph has its address
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._table.launch()
            for place, value in others:
                place.copy_(value, non_blocking=True)

    def run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
