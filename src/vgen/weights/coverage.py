"""Whether what a loader was seen to write is all of a destination, each byte once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .recorder import Copy, Fill

MOST_RUNS = 1 << 24
"""A record in more pieces than this is not worth replaying."""


def runs(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The contiguous pieces of memory that make up `tensor`, in its own order: their addresses, and bytes of each."""
    size = tensor.element_size()
    shape, strides = list(tensor.shape), list(tensor.stride())
    length = 1
    while shape and (shape[-1] == 1 or strides[-1] == length):
        length *= shape.pop()
        strides.pop()
    count = torch.Size(shape).numel()
    if count > MOST_RUNS:
        raise ValueError(f"{count} separate pieces")
    starts = torch.zeros(1, dtype=torch.int64)
    for extent, stride in zip(shape, strides, strict=True):
        starts = (starts[:, None] + torch.arange(extent) * stride).flatten()
    return tensor.data_ptr() + starts * size, length * size


def superseded(copies: Sequence[Copy]) -> set[int]:
    """Which copies a later one writes over in whole, as of a tied weight that comes under two names."""
    last: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}
    over = set[int]()
    for index, copy in enumerate(copies):
        key = copy.place.data_ptr(), tuple(copy.place.shape), copy.place.stride()
        if key in last:
            over.add(last[key])
        last[key] = index
    return over


def problem_of(target: torch.Tensor, copies: Sequence[tuple[int, Copy]], fills: Sequence[Fill]) -> str | None:
    """Why replaying would not leave `target` as the loader does; None when it would.

    `copies` come with their place in the loader's order. Replaying writes the constants first.
    """
    if not target.numel():
        return "the engine has repacked it"
    if not _dense(target):
        return "it has gaps"
    try:
        written = [_spans(copy.place) for _, copy in copies]
        if written and _overlap(torch.cat(written)):
            return "parts of it are written twice"
        for fill in fills:
            earlier = [spans for (order, _), spans in zip(copies, written, strict=True) if order < fill.after]
            if _overlap(torch.cat([_joined(_spans(fill.place)), *earlier])):
                return "a constant is written over what was loaded"
        everything = torch.cat([*written, *(_spans(fill.place) for fill in fills)]) if written or fills else None
    except ValueError as error:
        return f"it is loaded in {error}"
    if everything is None:
        return "nothing is loaded into it"
    start, size = target.data_ptr(), target.numel() * target.element_size()
    if not torch.equal(_joined(everything), torch.tensor([[start, start + size]])):
        return "a part of it is not loaded"
    return None


def _spans(tensor: torch.Tensor) -> torch.Tensor:
    """Start and end of each piece."""
    starts, length = runs(tensor)
    return torch.stack([starts, starts + length], dim=1)


def _joined(spans: torch.Tensor) -> torch.Tensor:
    """The same memory in as few spans as can be, in order."""
    spans = spans[spans[:, 0].argsort()]
    ends = spans[:, 1].cummax(0).values
    first = torch.ones(len(spans), dtype=torch.bool)
    first[1:] = spans[1:, 0] > ends[:-1]
    last = first.roll(-1)
    return torch.stack([spans[first, 0], ends[last]], dim=1)


def _overlap(spans: torch.Tensor) -> bool:
    spans = spans[spans[:, 0].argsort()]
    return bool((spans[1:, 0] < spans[:-1, 1]).any())


def _dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one piece of memory, in whatever order."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return extent == tensor.numel()
