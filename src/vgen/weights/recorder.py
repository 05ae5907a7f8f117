"""What a model's own loader does with the tensors that it is given, seen by running it once on placeholders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Metadata: TypeAlias = Sequence[tuple[str, tuple[int, ...], torch.dtype]]
"""Name, shape and dtype of every tensor of a source's pass, in its order."""


@dataclass(frozen=True, slots=True)
class Part:
    """A strided part of a contiguous tensor: elements, counted from its first."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same part of a live tensor. One laid out otherwise is copied first, so that no wrong byte is read."""
        tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
        if tensor.dtype != self.dtype:
            tensor = tensor.view(-1).view(self.dtype)
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy that the loader makes: a part of a source's tensor into a part of a destination."""

    source: str
    part: Part
    place: torch.Tensor
    """A view of the live destination: it stays right for as long as that keeps its storage."""
    target: int
    """Which destination, by its number."""


@dataclass(frozen=True, slots=True)
class Fill:
    """A constant that the loader writes, such as the zeros of a padded vocabulary."""

    place: torch.Tensor
    value: float
    target: int
    after: int
    """How many copies came before it."""


class Recorder(TorchDispatchMode):
    """Runs a loader on placeholders without data, keeps the copies it makes, and writes nothing.

    A source's tensors are on the meta device. A view of one shares its storage, so offset, shape and strides say
    all of the chain of views that led to it. Whatever is not a view, and whatever else writes into a destination,
    is kept as a reason not to trust the record: `spoiled` by destination, `used` by source.
    """

    def __init__(self, targets: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self.fills: list[Fill] = []
        self.spoiled: dict[int, str] = {}
        self.used: dict[str, str] = {}
        self._targets = {_storage(tensor): index for index, tensor in reversed(list(enumerate(targets)))}
        self._sources: dict[int, str] = {}
        self._derived: dict[int, set[str]] = {}
        self._kept: list[Any] = list(targets)  # a storage's address may not be used again

    def placeholders(self, metadata: Metadata) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream to run the loader on."""
        for name, shape, dtype in metadata:
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            self._sources[_storage(tensor)] = name
            self._kept.append(tensor)
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = _written(func, args, kwargs)
        if any(_storage(tensor) in self._targets for tensor in written):
            return self._write(func, args, kwargs, written, tensors)
        names = self._names(tensors)
        if not names:
            return func(*args, **kwargs)
        if written:
            return self._spread(func, args, kwargs, written, names)
        if func in _SAME_VALUES and kwargs.get("dtype") in (None, args[0].dtype) and args[0].is_meta:
            return args[0]  # another place, the same values: whoever writes into it is found out
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) not in self._sources:
                self._derive(func, leaf, names)
        return result

    def _write(self, func: Any, args: Any, kwargs: Any, written: list[torch.Tensor], tensors: list[Any]) -> Any:
        """Keep what would be written into destinations, without doing it."""
        place, others = args[0], [tensor for tensor in tensors if tensor is not args[0]]
        target = self._targets.get(_storage(place)) if isinstance(place, torch.Tensor) else None
        if target is not None and func is torch.ops.aten.copy_.default and self._is_source(args[1]):
            name = self._sources[_storage(args[1])]
            if place.shape == args[1].shape:
                self.copies.append(Copy(name, _part(args[1]), place.detach(), target))
            else:
                self.spoiled.setdefault(target, f"{name} is broadcast into it")
                self.used.setdefault(name, "broadcast")
        elif target is not None and func in _CONSTANTS and not others:
            if place.numel():
                value = 0.0 if func is torch.ops.aten.zero_.default else float(args[1])
                self.fills.append(Fill(place.detach(), value, target, len(self.copies)))
        else:
            names = self._names(tensors)
            for tensor in written:
                if (found := self._targets.get(_storage(tensor))) is not None:
                    self.spoiled.setdefault(found, f"{_name(func)} writes into it what is no part of a source")
            self._use(func, names)
        return place if isinstance(place, torch.Tensor) else None

    def _spread(self, func: Any, args: Any, kwargs: Any, written: list[torch.Tensor], names: set[str]) -> Any:
        """A source goes into a tensor that is no destination, or is itself written to."""
        self._use(func, names)
        for tensor in written:
            if _storage(tensor) not in self._sources:
                self._derive(func, tensor, names)
        if all(tensor.is_meta for tensor in written):
            to_meta = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            return func(*to_meta[0], **to_meta[1])
        return written[0]

    def _derive(self, func: Any, tensor: torch.Tensor, names: set[str]) -> None:
        self._kept.append(tensor)
        self._derived.setdefault(_storage(tensor), set()).update(names)
        self._use(func, names)

    def _use(self, func: Any, names: Iterable[str]) -> None:
        for name in names:
            self.used.setdefault(name, _name(func))

    def _is_source(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and _storage(tensor) in self._sources

    def _names(self, tensors: Iterable[torch.Tensor]) -> set[str]:
        """The sources that these are, or are made of."""
        names = set[str]()
        for storage in map(_storage, tensors):
            if storage in self._sources:
                names.add(self._sources[storage])
            else:
                names |= self._derived.get(storage, set())
        return names


def record(load: Callable[[Any], Any], targets: Sequence[torch.Tensor], metadata: Metadata) -> Recorder:
    """Run `load` on placeholders. What it raises, as a loader does that reads values, is the caller's to judge."""
    recorder = Recorder(targets)
    stream = recorder.placeholders(metadata)
    with torch.no_grad(), recorder:
        load(stream)
    return recorder


_SAME_VALUES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
_CONSTANTS = {torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _name(func: Any) -> str:
    return str(func).removeprefix("aten.").partition(".")[0]


def _part(tensor: torch.Tensor) -> Part:
    return Part(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors among the arguments that the operation writes to."""
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found
