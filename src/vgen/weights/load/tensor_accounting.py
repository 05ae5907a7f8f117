"""Sets of bytes, and whether a recorded loader writes every byte of a destination, each byte once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import torch

from .load_recorder import ConstantFill, SliceCopy

MOST_RUNS = 1 << 24
"""The most contiguous pieces that one slice may have: replaying more is not worth it."""


def runs(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The contiguous pieces of memory that make up `tensor`, in its order: their addresses, and the bytes of each."""
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


class Spans:
    """A set of bytes of one storage, as spans from its beginning. Grows by `add`."""

    def __init__(self, spans: Iterable[torch.Tensor] = ()) -> None:
        self._spans = list(spans)
        """Tensors of rows `(start, end)`, which may overlap."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """The bytes of a view, which may be on the meta device."""
        dims = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        dims = sorted((dim for dim in dims if dim[1] != 1), reverse=True)
        if not tensor.numel():
            return cls()
        length = 1
        while dims and dims[-1][0] == length:
            length *= dims.pop()[1]
        starts = torch.tensor([int(tensor.storage_offset())])
        for stride, size in dims:
            starts = (starts[:, None] + torch.arange(size) * stride).flatten()
        item = tensor.element_size()
        return cls([torch.stack([starts * item, (starts + length) * item], dim=1)])

    @classmethod
    def union(cls, several: Iterable[Spans]) -> Self:
        return cls(spans for one in several for spans in one._spans)

    def add(self, other: Spans) -> None:
        self._spans += other._spans

    def __bool__(self) -> bool:
        return bool(self._spans)

    def elements(self, item_size: int) -> int:
        """How many elements of `item_size` bytes there are in it."""
        self._join()
        return sum(int((spans[:, 1] - spans[:, 0]).sum()) for spans in self._spans) // item_size

    def bounds(self) -> tuple[int, int]:
        """Where the first of its spans begins and the last ends. Only if it is not empty."""
        self._join()
        return int(self._spans[0][0, 0]), int(self._spans[0][-1, 1])

    def as_of(self, tensor: torch.Tensor, other: torch.Tensor) -> Spans:
        """Spans of `tensor`, as those of another view's elements with the same strides, of any dtype."""
        size, other_size = tensor.element_size(), other.element_size()
        moved = int(other.storage_offset()) - int(tensor.storage_offset())
        return Spans((spans // size + moved) * other_size for spans in self._spans)

    def covers(self, other: Spans) -> bool:
        """Whether every byte of `other` is in it."""
        both = type(self).union([self, other])
        return both.elements(1) == self.elements(1)

    def within(self, other: Spans) -> Spans:
        """As many of its bytes as are in `other`, which is one span or a few."""
        if not (self and other):
            return Spans()
        self._join()
        other._join()
        parts = [
            torch.stack([spans[:, 0].clamp(min=start), spans[:, 1].clamp(max=end)], dim=1)
            for spans in self._spans
            for start, end in torch.cat(other._spans).tolist()
        ]
        return Spans(part[part[:, 0] < part[:, 1]] for part in parts)

    def _join(self) -> None:
        if self._spans:
            self._spans = [_joined(torch.cat(self._spans))]


def superseded(copies: Sequence[SliceCopy]) -> set[int]:
    """The indices of copies that a later one overwrites completely, as of a tied weight that has two names."""
    last: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}
    overwritten = set[int]()
    for index, copy in enumerate(copies):
        key = copy.place.data_ptr(), tuple(copy.place.shape), copy.place.stride()
        if key in last:
            overwritten.add(last[key])
        last[key] = index
    return overwritten


def replay_problem(
    target: torch.Tensor, copies: Sequence[tuple[int, SliceCopy]], fills: Sequence[ConstantFill]
) -> str | None:
    """Why a replay would not leave in `target` what the loader leaves; None if it would.

    `copies` come with their index in the loader's order. A replay writes the constants first.
    """
    if not target.numel():
        return "the engine has repacked it"
    if not is_dense(target):
        return "it has gaps"
    if not (copies or fills):
        return "nothing is loaded into it"
    try:
        copied = [_spans(copy.place) for _, copy in copies]
        filled = [_spans(fill.place) for fill in fills]
    except ValueError as error:
        return f"it is loaded in {error}"
    if copied and _overlap(torch.cat(copied)):
        return "parts of it are written twice"
    for fill, spans in zip(fills, filled, strict=True):
        earlier = [other for (order, _), other in zip(copies, copied, strict=True) if order < fill.after]
        if _overlap(torch.cat([_joined(spans), *earlier])):
            return "a constant is written over what was loaded"
    start, size = target.data_ptr(), target.numel() * target.element_size()
    if not torch.equal(_joined(torch.cat([*copied, *filled])), torch.tensor([[start, start + size]])):
        return "a part of it is not loaded"
    return None


def _spans(tensor: torch.Tensor) -> torch.Tensor:
    """Start and end address of each contiguous piece."""
    starts, length = runs(tensor)
    return torch.stack([starts, starts + length], dim=1)


def _joined(spans: torch.Tensor) -> torch.Tensor:
    """The same memory in as few spans as possible, in order."""
    spans = spans[spans[:, 0].argsort()]
    ends = spans[:, 1].cummax(0).values
    first = torch.ones(len(spans), dtype=torch.bool)
    first[1:] = spans[1:, 0] > ends[:-1]
    last = first.roll(-1)
    return torch.stack([spans[first, 0], ends[last]], dim=1)


def _overlap(spans: torch.Tensor) -> bool:
    spans = spans[spans[:, 0].argsort()]
    return bool((spans[1:, 0] < spans[:-1, 1]).any())


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one piece of memory, in any order."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return extent == tensor.numel()
