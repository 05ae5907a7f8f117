"""One kernel that moves any number of pieces of device memory: thousands of copies for the price of one.

It is there because a copy costs about two microseconds to launch, also in a graph: 6,144 of them, the experts of a
3.3 B model, took 5.5 ms on an H200 over four streams where the memory allows 3.1 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

CHUNK_BYTES = 32 << 10
"""What one program moves. On an H100 more took longer: 1.2 % with 64 KB, 5.6 % with 512 KB."""
BLOCK = 4096
"""Words that a program has in flight: with 8 warps and words of 8 bytes, eight loads of 16 bytes a thread."""
WARPS = 8


class Table:
    """Moves on one device, cut into chunks. The memory must stay where it is for as long as this is used."""

    def __init__(self, moves: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        wide = [move for move in moves if not any(number % 16 for number in move)]
        narrow = [move for move in moves if any(number % 16 for number in move)]
        self._tables = [(_chunks(kind, word, device), word) for kind, word in ((wide, 8), (narrow, 1)) if kind]

        nothing = torch.zeros(1, 3, dtype=torch.int64, device=device)
        for _, word in self._tables:
            _launch(nothing, word)  # compiles it: a capture would not survive that

    def move(self) -> None:
        """Launch it on the current stream."""
        for table, word in self._tables:
            _launch(table, word)


def _launch(table: torch.Tensor, word: int) -> None:
    _move[(len(table),)](table, CHUNK_BYTES // word, BLOCK, word, num_warps=WARPS)  # pyright: ignore[reportIndexIssue]


def _chunks(moves: Sequence[tuple[int, int, int]], word: int, device: torch.device) -> torch.Tensor:
    """Destination, source and words of each chunk."""
    rows = torch.tensor(moves, dtype=torch.int64)
    count = -(-rows[:, 2] // CHUNK_BYTES)
    number = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    rows = rows.repeat_interleave(count, dim=0)
    start = number * CHUNK_BYTES
    size = (rows[:, 2] - start).clamp(max=CHUNK_BYTES)
    return torch.stack([rows[:, 0] + start, rows[:, 1] + start, size // word], dim=1).to(device)


@triton.jit
def _move(table, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WORD: tl.constexpr):  # pyright: ignore
    row = table + tl.program_id(0).to(tl.int64) * 3
    count = tl.load(row + 2)
    at = tl.arange(0, BLOCK)
    if WORD == 8:
        place = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int64)), 16)
        value = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int64)), 16)
    else:
        place = tl.load(row).to(tl.pointer_type(tl.int8))
        value = tl.load(row + 1).to(tl.pointer_type(tl.int8))
    if count == CHUNK:
        for step in tl.static_range(0, CHUNK, BLOCK):  # without a mask: loads of 16 bytes
            tl.store(place + step + at, tl.load(value + step + at))
    else:
        for step in range(0, count, BLOCK):
            keep = step + at < count
            tl.store(place + step + at, tl.load(value + step + at, mask=keep), mask=keep)
