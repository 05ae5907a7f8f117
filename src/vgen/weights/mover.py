"""Copies between tensors that stay where they are, on one CUDA device, at the speed of its memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import torch

from .coverage import runs
from .verify import Differences

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A place and the value that belongs there."""
Group: TypeAlias = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Places and their values, all of the same dtypes and devices."""
Move: TypeAlias = tuple[int, int, int]
"""Destination address, source address and bytes."""

LEAST_RUN = 512
"""Rows shorter than this many bytes are left to torch."""
AHEAD = 8
"""How many of the copies, the largest, are started before the others were looked at."""

_log = logging.getLogger(__name__)


class Mover(Protocol):
    """Makes the same copies each time: the first of them by `start`, the others by `finish`, or all by `run`.

    It holds addresses, and keeps nothing alive. `largest` are the storages, places' and values', that `start` needs.
    """

    how: str
    largest: set[int]

    def start(self) -> None: ...

    def finish(self) -> None: ...

    def run(self) -> None: ...


def copy_together(pairs: Iterable[Pair]) -> None:
    """Copy each value of `(place, value)` into its place, those of the same dtypes and devices in one call."""
    copy_groups(grouped(pairs))


def grouped(pairs: Iterable[Pair]) -> list[Group]:
    """The pairs that one call copies."""
    groups: dict[Any, Group] = {}
    for place, value in pairs:
        places, values = groups.setdefault((place.dtype, value.dtype, place.device, value.device), ([], []))
        places.append(place)
        values.append(value)
    return list(groups.values())


def copy_groups(groups: list[Group]) -> None:
    """Copy what `grouped` has put together."""
    for places, values in groups:
        torch._foreach_copy_(places, values, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]


def mover_of(pairs: list[Pair]) -> Mover | None:
    """Copy `pairs` and prove it; returns what does it again, or None where torch's own calls must do.

    What fails or copies wrongly is left, and said so in the log.
    """
    device = pairs[0][0].device
    if any(tensor.device != device or not tensor.is_cuda for pair in pairs for tensor in pair):
        return None
    try:
        mover = KernelMover(pairs)
        mover.run()
        wrong = Differences()
        for index, (place, value) in enumerate(pairs):
            wrong.compare(str(index), place, value)
        if not wrong.names():
            return mover
        _log.error("weights copied by a kernel came out wrong; it is not used")
    except Exception as error:
        _log.warning("weights cannot be copied by a kernel: %s: %s", type(error).__name__, error)
    return None


def moves_of(pairs: list[Pair]) -> tuple[list[Move], list[Pair]]:
    """The pairs as plain moves of bytes, adjacent ones of the same two storages joined; and those that are none."""
    found: list[tuple[int, int, int, int, int]] = []
    others: list[Pair] = []
    for place, value in pairs:
        pieces = _pieces(place, value)
        if pieces is None:
            others.append((place, value))
            continue
        owners = place.untyped_storage().data_ptr(), value.untyped_storage().data_ptr()
        found += [(*owners, *piece) for piece in pieces]
    found.sort(key=lambda move: move[2])
    joined: list[tuple[int, int, int, int, int]] = []
    for to, of, destination, source, size in found:
        if joined:
            last = joined[-1]
            if (to, of, destination, source) == (last[0], last[1], last[2] + last[4], last[3] + last[4]):
                joined[-1] = (*last[:4], last[4] + size)
                continue
        joined.append((to, of, destination, source, size))
    return [move[2:] for move in joined], others


def _pieces(place: torch.Tensor, value: torch.Tensor) -> list[Move] | None:
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


class KernelMover:
    """Launches over tables of moves, and what needs a conversion beside them: graphs of both."""

    how = "kernel"

    def __init__(self, pairs: list[Pair]) -> None:
        by_size = sorted(pairs, key=lambda pair: pair[0].numel() * pair[0].element_size(), reverse=True)
        ahead = min(AHEAD, len(pairs) // 2)
        self.largest = {tensor.untyped_storage().data_ptr() for pair in by_size[:ahead] for tensor in pair}
        self._ahead, self._others = _Launch(by_size[:ahead]), _Launch(by_size[ahead:])

    def start(self) -> None:
        self._ahead.run()

    def finish(self) -> None:
        self._others.run()

    def run(self) -> None:
        self.start()
        self.finish()


class _Launch:
    """One graph of a table's kernels and of torch's own copies."""

    def __init__(self, pairs: list[Pair]) -> None:
        from .move_kernel import Table

        self._graph: torch.cuda.CUDAGraph | None = None
        if not pairs:
            return
        moves, others = moves_of(pairs)
        self._table = Table(moves, pairs[0][0].device)  # the graph has its address
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._table.move()
            for place, value in others:
                place.copy_(value, non_blocking=True)

    def run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
