"""What a model's own loader does with the tensors that it gets, observed by running it once on placeholders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...engine_protocol import TensorMetadata
from ..source.address_snapshot import storage_id


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A strided slice of a contiguous tensor; strides and offset are in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This slice of a live tensor. One that is not contiguous is copied first, so that no wrong byte is read."""
        tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
        if tensor.dtype != self.dtype:
            tensor = tensor.view(-1).view(self.dtype)
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class SliceCopy:
    """One copy that the loader makes: a slice of a source's tensor into a slice of a destination."""

    source: str
    part: TensorSlice
    place: torch.Tensor
    """A view of the live destination; valid as long as the destination keeps its storage."""
    target: int
    """The index of the destination."""


@dataclass(frozen=True, slots=True)
class ConstantFill:
    """A constant that the loader writes, such as the zeros of a padded vocabulary."""

    place: torch.Tensor
    value: float
    target: int
    after: int
    """How many copies the loader made before."""


class LoadRecorder(TorchDispatchMode):
    """Runs a loader on placeholders without data, records the copies that it makes, and writes nothing.

    A source's tensors are on the meta device. A view of one shares its storage, so the view's offset, shape and
    strides describe the whole chain of view operations. Any other operation on a source, and any other write into a
    destination, is recorded as a reason not to use the record: `spoiled` by destination, `used` by source.
    """

    def __init__(self, targets: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.copies: list[SliceCopy] = []
        self.fills: list[ConstantFill] = []
        self.spoiled: dict[int, str] = {}
        self.used: dict[str, str] = {}
        self._targets = {storage_id(tensor): index for index, tensor in reversed(list(enumerate(targets)))}
        self._sources: dict[int, str] = {}
        self._derived: dict[int, set[str]] = {}
        self._alive: list[Any] = list(targets)  # the id of a freed storage could be used again

    def placeholders(self, metadata: TensorMetadata) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream to run the loader on."""
        for name, shape, dtype in metadata:
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            self._sources[storage_id(tensor)] = name
            self._alive.append(tensor)
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = written_tensors(func, args, kwargs)
        if any(storage_id(tensor) in self._targets for tensor in written):
            return self._record_write(func, args, written, operands)
        names = self._names(operands)
        if not names:
            return func(*args, **kwargs)
        if written:
            return self._record_use_in_write(func, args, kwargs, written, names)
        if func in _SAME_VALUES and kwargs.get("dtype") in (None, args[0].dtype) and args[0].is_meta:
            return args[0]  # a copy with the same values; a later write into it is recorded as one into the source
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and storage_id(leaf) not in self._sources:
                self._derive(func, leaf, names)
        return result

    def _record_write(self, func: Any, args: Any, written: list[torch.Tensor], operands: list[torch.Tensor]) -> Any:
        """Record what would be written into destinations, without writing it."""
        place = args[0] if isinstance(args[0], torch.Tensor) else None
        target = None if place is None else self._targets.get(storage_id(place))
        if place is None or target is None:
            self._record_spoiling(func, written, operands)
        elif func is torch.ops.aten.copy_.default and self._is_source(args[1]):
            self._record_copy(place, args[1], target)
        elif func in _CONSTANTS and all(operand is place for operand in operands):
            if place.numel():
                value = 0.0 if func is torch.ops.aten.zero_.default else float(args[1])
                self.fills.append(ConstantFill(place.detach(), value, target, len(self.copies)))
        else:
            self._record_spoiling(func, written, operands)
        return place

    def _record_copy(self, place: torch.Tensor, value: torch.Tensor, target: int) -> None:
        name = self._sources[storage_id(value)]
        if place.shape == value.shape:
            part = TensorSlice(value.dtype, tuple(value.shape), value.stride(), int(value.storage_offset()))
            self.copies.append(SliceCopy(name, part, place.detach(), target))
        else:
            self.spoiled.setdefault(target, f"{name} is broadcast into it")
            self.used.setdefault(name, "broadcast")

    def _record_spoiling(self, func: Any, written: list[torch.Tensor], operands: list[torch.Tensor]) -> None:
        for tensor in written:
            if (target := self._targets.get(storage_id(tensor))) is not None:
                self.spoiled.setdefault(target, f"{_name(func)} writes into it what is no part of a source")
        self._use(func, self._names(operands))

    def _record_use_in_write(
        self, func: Any, args: Any, kwargs: Any, written: list[torch.Tensor], names: set[str]
    ) -> Any:
        """A source is written to, or goes into a tensor that is no destination: that tensor is made of it then."""
        self._use(func, names)
        for tensor in written:
            if storage_id(tensor) not in self._sources:
                self._derive(func, tensor, names)
        if all(tensor.is_meta for tensor in written):
            on_meta = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            return func(*on_meta[0], **on_meta[1])
        return written[0]

    def _derive(self, func: Any, tensor: torch.Tensor, names: set[str]) -> None:
        self._alive.append(tensor)
        self._derived.setdefault(storage_id(tensor), set()).update(names)
        self._use(func, names)

    def _use(self, func: Any, names: Iterable[str]) -> None:
        for name in names:
            self.used.setdefault(name, _name(func))

    def _is_source(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and storage_id(tensor) in self._sources

    def _names(self, tensors: Iterable[torch.Tensor]) -> set[str]:
        """The names of the sources that the tensors are, or are made of."""
        names = set[str]()
        for storage in map(storage_id, tensors):
            if storage in self._sources:
                names.add(self._sources[storage])
            else:
                names |= self._derived.get(storage, set())
        return names


def record_loader(
    load: Callable[[Any], Any], targets: Sequence[torch.Tensor], metadata: TensorMetadata
) -> LoadRecorder:
    """Run `load` on placeholders, with `targets` as destinations. Raises what `load` raises, for example if it reads
    values of a placeholder.
    """
    recorder = LoadRecorder(targets)
    stream = recorder.placeholders(metadata)
    with torch.no_grad(), recorder:
        load(stream)
    return recorder


_SAME_VALUES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
_CONSTANTS = {torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default}


def _name(func: Any) -> str:
    return str(func).removeprefix("aten.").partition(".")[0]


def written_tensors(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors among the arguments that the operation writes to."""
    tensors: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            tensors += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return tensors
