"""What an engine's loader does with each element that it gets: observed on placeholders, without data.

Unlike the record of `load_recorder`, which holds only copies that can be repeated, this follows every operation, over
the layers as they were before vLLM processed their weights.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...engine_protocol import TensorMetadata
from ..source.address_snapshot import storage_address, storage_id
from .load_recorder import written_tensors
from .tensor_accounting import Spans

SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")
"""Parameters of attention layers that a checkpoint may leave out: vLLM has a default for them."""
_SAME_ELEMENTS = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
"""Operations whose result has the elements of their input, one for one."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A tensor that is not fully read, or not fully written."""

    name: str
    shape: tuple[int, ...]
    elements: int
    """How many of its elements are read, or written."""
    others: tuple[str, ...] = ()
    """For a source: the engine's tensors that it is loaded into, each with its shape. For one of the engine's: the
    sources that are loaded into it."""

    def __str__(self) -> str:
        total = torch.Size(self.shape).numel()
        return f"{self.elements} of its {total} elements (shape {list(self.shape)})"


@contextmanager
def as_constructed(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """A block in which the layers have the tensors, without data, that they had before their weights were processed.

    Yields where each parameter is in memory, by name: in the block, tied ones are apart.
    """
    layerwise: Any = sys.modules.get("vllm.model_executor.model_loader.reload.layerwise")
    modules = list(model.modules())
    before = [(dict(m._parameters), dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    attributes = [dict(module.__dict__) for module in modules]
    addresses = {name: storage_address(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
    try:
        for module in modules:
            info = layerwise and layerwise.LAYERWISE_INFO.get(module)
            if info is not None and not info.can_load():
                layerwise.restore_layer_on_meta(module, info)
                tables: list[dict[str, Any]] = [module._parameters, module._buffers]
                for table in tables:
                    table.update({name: _copy_without_data(t) for name, t in table.items() if t is not None})
        yield addresses
    finally:
        for module, (parameters, buffers, non_persistent), state in zip(modules, before, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(state)
            pairs: list[tuple[dict[str, Any], Any]] = [(module._parameters, parameters), (module._buffers, buffers)]
            for table, content in pairs:
                table.clear()
                table.update(content)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)


def _copy_without_data(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter that only the audit has, with the loader that it had before a reload or a quantization wrapped it."""
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    copy: Any = to_meta_tensor(tensor)
    if hasattr(copy, "weight_loader"):
        copy.weight_loader = _get_original_loader(copy)
    return copy


@dataclass(slots=True)
class _Tracked:
    """A placeholder of the source, or a tensor that an operation made of some: who reads its elements."""

    name: str
    """The source's name; empty for a tensor that an operation made."""
    parents: list[torch.Tensor]
    same_elements: bool
    """Whether each element stands for one of its only parent's."""
    meta: torch.Tensor
    reads: Spans = field(default_factory=Spans)
    extra: int = 0
    """Elements read by way of tensors of which only a part was read, so that it is unknown which."""

    def elements(self) -> int:
        """How many elements are read."""
        return self.reads.elements(self.meta.dtype.itemsize) + self.extra


Reads: TypeAlias = "tuple[Spans, int]"
"""What is read of a placeholder: `reads` and `extra` of `_Tracked`."""


class LoadObserver(TorchDispatchMode):
    """Counts what a loader does with placeholders: which of their elements go into which elements of a parameter."""

    def __init__(self, model: torch.nn.Module, shared: Mapping[str, int]) -> None:
        super().__init__()
        self._shared = shared
        self.last = ""
        """The name of the placeholder that the loader has now; empty when it has had all. After an error, all names
        that the error may concern."""
        self.mistyped: dict[str, str] = {}
        self.narrowed = set[str]()
        self._last_read: torch.Tensor | None = None
        self._model = model
        self._targets: dict[int, tuple[str, torch.Tensor]] = {}
        for path, module in model.named_modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and not isinstance(tensor, torch.nn.parameter.UninitializedParameter):
                        self._targets.setdefault(
                            storage_id(tensor), (f"{path}.{name}" if path else name, tensor.detach())
                        )
        self._writes = defaultdict[int, Spans](Spans)
        self._written_by = defaultdict[int, list[tuple[Spans, str]]](list)
        self._tracked: dict[int, _Tracked] = {}
        self._places = defaultdict[str, dict[str, None]](dict)

    def run(self, metadata: TensorMetadata) -> Exception | None:
        """Run the loader; returns the error that it ended with."""
        load: Callable[[Any], Any] = self._model.load_weights  # pyright: ignore[reportAssignmentType]
        try:
            with self:
                load(self._placeholders(metadata))
        except Exception as error:
            if not self.last and self._last_read is not None:  # the loader had collected all tensors before
                self.last = ", ".join(sorted(self._names(self._last_read)))
            return error
        self._attribute_reads()
        return None

    def _placeholders(self, metadata: TensorMetadata) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream to run the loader on."""
        for name, shape, dtype in metadata:
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            self._tracked[storage_id(tensor)] = _Tracked(name, [], False, tensor)
            self.last = name
            yield name, tensor
        self.last = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = written_tensors(func, args, kwargs)
        into = [tensor for tensor in written if storage_id(tensor) in self._targets]
        read = [tensor for tensor in operands if storage_id(tensor) in self._tracked]
        if read:
            self._last_read = read[0]
        if into:
            if func is torch.ops.aten.copy_.default and args[1].shape != args[0].shape:
                args[1].expand(args[0].shape)  # raises, as the copy would
            self._load(into, read)
            return args[0]
        if not read:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        result = func(*args, **kwargs)
        for leaf in [*tree_leaves(result), *written]:
            if isinstance(leaf, torch.Tensor):
                self._derive(leaf, read, func in _SAME_ELEMENTS and len(read) == 1)
        return result

    def _load(self, into: Sequence[torch.Tensor], read: Sequence[torch.Tensor]) -> None:
        """Note that elements of `read` are written into `into`."""
        names = {name for tensor in read for name in self._names(tensor)}
        for tensor in into:
            key = storage_id(tensor)
            spans = Spans.of(tensor)
            self._writes[key].add(spans)
            target = f"{self._targets[key][0]} {list(self._targets[key][1].shape)}"
            for name in names:
                self._places[name][target] = None
            for each in read:
                self._check_dtype(each, tensor.dtype)
            if names:
                self._written_by[key].append((spans, next(iter(names)) if len(names) == 1 else ""))
        for tensor in read:
            self._tracked[storage_id(tensor)].reads.add(Spans.of(tensor))

    def _check_dtype(self, tensor: torch.Tensor, place: torch.dtype) -> None:
        """Note what is lost if `tensor` goes into a place of that dtype, by casts before the copy too."""
        dtypes = [tensor.dtype]
        while (tracked := self._tracked[storage_id(tensor)]).same_elements:
            (tensor,) = tracked.parents
            dtypes.append(tensor.dtype)
        for dtype in dtypes:
            problem = ""
            if dtype.is_complex != place.is_complex or dtype.is_floating_point != place.is_floating_point:
                problem = f"it is {_short(dtype)} and goes into {_short(place)}"
            elif dtype.is_floating_point and dtype.itemsize == 1 and place.itemsize > 1:
                problem = f"it is quantized ({_short(dtype)}) and goes into {_short(place)}"
            if problem:
                self.mistyped |= dict.fromkeys(self._names(tensor), problem)
        if dtypes[-1].itemsize > place.itemsize:
            self.narrowed |= self._names(tensor)

    def _derive(self, tensor: torch.Tensor, parents: Sequence[torch.Tensor], same_elements: bool) -> None:
        key = storage_id(tensor)
        if key not in self._tracked:
            self._tracked[key] = _Tracked("", [*parents], same_elements, tensor)
        elif key not in {storage_id(parent) for parent in parents}:  # written to again: it is made of more
            self._tracked[key].parents += parents
            self._tracked[key].same_elements = False

    def _names(self, tensor: torch.Tensor) -> set[str]:
        """The names of the placeholders that the tensor is made of."""
        names, waiting, seen = set[str](), [tensor], set[int]()
        while waiting:
            key = storage_id(waiting.pop())
            if key in self._tracked and key not in seen:
                seen.add(key)
                tracked = self._tracked[key]
                names |= {tracked.name} - {""}
                waiting += tracked.parents
        return names

    def _attribute_reads(self) -> None:
        """Attribute what was read of tensors that operations made to those that they were made of."""
        for key, name, tensor in list(self._registered_placeholders()):
            self._targets = {k: target for k, target in self._targets.items() if target[0] != name}
            self._targets[key] = name, tensor.detach()
            self._load([tensor], [tensor])
        for tracked in reversed(self._tracked.values()):
            if not (tracked.parents and (tracked.reads or tracked.extra)):
                continue
            for parent in tracked.parents:
                of = self._tracked[storage_id(parent)]
                if not tracked.same_elements or tracked.elements() >= tracked.meta.numel():
                    of.reads.add(Spans.of(parent))
                elif parent.stride() == tracked.meta.stride():
                    of.reads.add(tracked.reads.as_of(tracked.meta, parent))
                    of.extra += tracked.extra
                else:
                    of.extra += tracked.elements()

    def _registered_placeholders(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        """Placeholders that modules hold now, of which all is read: the ids of their storages, names and tensors.

        They take the places of the tensors that had these names before.
        """
        for path, module in self._model.named_modules():
            tables: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]
            for name, tensor in ((name, value) for table in tables for name, value in table.items()):
                if isinstance(tensor, torch.Tensor) and (key := storage_id(tensor)) in self._tracked:
                    yield key, f"{path}.{name}" if path else name, tensor

    def shortfalls(self) -> dict[str, Reads]:
        """What is read, on this rank, of placeholders that are not wholly read on it, by name."""
        placeholders = [tracked for tracked in self._tracked.values() if tracked.name]
        return {t.name: (t.reads, t.extra) for t in placeholders if t.elements() < t.meta.numel()}

    def places(self, name: str) -> tuple[str, ...]:
        """The engine's tensors that a placeholder is loaded into, with their shapes."""
        return tuple(self._places.get(name, ()))

    def unwritten(self) -> Iterator[Shortfall]:
        """The parameters that are not wholly written, also not under the name of one that shares their memory."""
        short: list[Shortfall] = []
        whole = set[int]()
        for key, (name, tensor) in self._targets.items():
            if not isinstance(self._parameter(name), torch.nn.Parameter) or name.rpartition(".")[2] in SCALES:
                continue
            elements = self._writes[key].within(Spans.of(tensor)).elements(tensor.element_size())
            if elements < tensor.numel():
                sources = tuple(dict.fromkeys(source for _, source in self._written_by.get(key, ()) if source))
                short.append(Shortfall(name, tuple(tensor.shape), elements, sources))
            else:
                whole.add(self._shared.get(name, 0))
        yield from (shortfall for shortfall in short if self._shared.get(shortfall.name, 0) not in whole - {0})

    def _parameter(self, name: str) -> Any:
        path, _, leaf = name.rpartition(".")
        return self._model.get_submodule(path)._parameters.get(leaf)

    def loaded(self) -> dict[str, float]:
        """See `LoadAudit`."""
        shares: dict[str, float] = {}
        for key, writes in self._written_by.items():
            name, tensor = self._targets[key]
            elements = Spans.union(spans for spans, _ in writes).elements(tensor.element_size())
            shares[name] = elements / max(1, tensor.numel())
        return shares

    def overwritten(self) -> dict[str, str]:
        """Placeholders whose elements another placeholder overwrites, all of them, and the name of that one.

        Tied parameters, which are apart only while the loader is observed, count as one.
        """
        lost: dict[str, str] = {}
        together = defaultdict[Any, list[tuple[Spans, str]]](list)
        for key, writes in self._written_by.items():
            name, tensor = self._targets[key]
            together[(self._shared.get(name) or name, tensor.shape)] += writes
        for writes in together.values():
            ordered = [(*spans.bounds(), order, spans, name) for order, (spans, name) in enumerate(writes) if spans]
            ordered.sort(key=itemgetter(0, 2))
            for index, (_, end, order, spans, name) in enumerate(ordered):
                for start, _, other_order, other, other_name in islice(ordered, index + 1, None):
                    if start >= end:
                        break
                    pair = [(order, spans, name), (other_order, other, other_name)]
                    (_, first, loser), (_, later, winner) = sorted(pair, key=itemgetter(0))
                    if loser and winner and loser != winner and later.covers(first):
                        lost[loser] = winner
        return lost

    def lacks_data(self, error: Exception) -> bool:
        """Whether the loader's error only says that a placeholder has no data.

        torch says so in several types of errors: the text names the device, meta, or the storage that is not allocated.
        Any other error is the loader's own, also a `NotImplementedError`.
        """
        text = str(error).lower()
        return isinstance(error, RuntimeError | TypeError) and ("meta" in text or "unallocated storage" in text)

    def refusal(self, error: Exception, metadata: TensorMetadata) -> str:
        """What the loader's error means for the tensor that it had."""
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if not self.last:
            return said
        names = self.last.split(", ")
        shape = ", ".join(str(list(shape)) for name, shape, _ in metadata if name in names)
        place = next((list(tensor.shape) for name, tensor in self._targets.values() if name == self.last), None)
        there = f", the engine's {place}" if place is not None else ""
        return f"the engine's loader refuses it (shape {shape}{there}): {said}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
