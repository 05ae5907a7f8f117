"""Copies between tensors that stay where they are, on one CUDA device, at the speed of its memory."""

from __future__ import annotations

import logging
from typing import Literal, Protocol, TypeAlias

import torch

from .coverage import runs
from .verify import Differences

How: TypeAlias = Literal["kernel", "graph", "foreach"]
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A place and the value that belongs there."""
Move: TypeAlias = tuple[int, int, int]
"""Destination address, source address and bytes."""

STREAMS = 4
LEAST_RUN = 512
"""Rows shorter than this many bytes are left to torch."""

_log = logging.getLogger(__name__)


class Mover(Protocol):
    """Makes the same copies each time `run` is called. It holds addresses, and keeps nothing alive."""

    how: How

    def run(self) -> None: ...


def mover_of(pairs: list[Pair], how: How | None = None) -> Mover | None:
    """Copy `pairs` and prove it; returns what does it again, or None where nothing is faster than torch's own calls.

    The ways are tried in turn, the fastest first; what fails or copies wrongly is left, and said so in the log.
    """
    device = pairs[0][0].device
    if how == "foreach" or any(tensor.device != device or not tensor.is_cuda for pair in pairs for tensor in pair):
        return None
    for way, make in (("kernel", KernelMover), ("graph", GraphMover)):
        if how not in (None, way):
            continue
        try:
            mover = make(pairs)
            mover.run()
            wrong = Differences()
            for index, (place, value) in enumerate(pairs):
                wrong.compare(str(index), place, value)
            if not wrong.names():
                return mover
            _log.error("weights copied by %s came out wrong; it is not used", way)
        except Exception as error:
            _log.warning("weights cannot be copied by %s: %s: %s", way, type(error).__name__, error)
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
    """One launch over a table of moves; what needs a conversion is captured in a graph beside it."""

    how: How = "kernel"

    def __init__(self, pairs: list[Pair]) -> None:
        from .move_kernel import Table

        moves, others = moves_of(pairs)
        self._table = Table(moves, pairs[0][0].device)
        self._others = _captured([others]) if others else None

    def run(self) -> None:
        self._table.move()
        if self._others is not None:
            self._others.replay()


class GraphMover:
    """A captured graph of plain copies over several streams."""

    how: How = "graph"

    def __init__(self, pairs: list[Pair]) -> None:
        moves, others = moves_of(pairs)
        storages = {tensor.untyped_storage().data_ptr(): tensor for pair in pairs for tensor in pair}
        owners = sorted(storages)
        views = [(_bytes(to, size, owners, storages), _bytes(of, size, owners, storages)) for to, of, size in moves]
        lanes: list[list[Pair]] = [[] for _ in range(STREAMS)]
        loads = [0] * STREAMS
        for pair in sorted(views, key=lambda pair: -pair[0].numel()):
            lane = loads.index(min(loads))
            lanes[lane].append(pair)
            loads[lane] += pair[0].numel()
        lanes[loads.index(min(loads))] += others
        self._graph = _captured(lanes)

    def run(self) -> None:
        self._graph.replay()


def _bytes(address: int, size: int, owners: list[int], storages: dict[int, torch.Tensor]) -> torch.Tensor:
    """The memory at `address` as a tensor of bytes."""
    from bisect import bisect_right

    start = owners[bisect_right(owners, address) - 1]
    tensor = storages[start]
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), address - start, (size,), (1,))


def _captured(lanes: list[list[Pair]]) -> torch.cuda.CUDAGraph:
    """A graph of the copies, each lane on a stream of its own."""
    graph = torch.cuda.CUDAGraph()
    sides = [torch.cuda.Stream() for _ in lanes]
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        main = torch.cuda.current_stream()
        for side, lane in zip(sides, lanes, strict=True):
            if not lane:
                continue
            side.wait_stream(main)
            with torch.cuda.stream(side):
                for place, value in lane:
                    place.copy_(value, non_blocking=True)
            main.wait_stream(side)
    return graph
