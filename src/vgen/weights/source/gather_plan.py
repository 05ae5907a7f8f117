"""How a model's tensors become its checkpoint's: which are gathered together, merged, converted, and in what order.

A plan holds no tensor of the model. It is computed from shapes alone, so that it is the same on every rank, and
computed anew when the model has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import peft
from .address_snapshot import storage_address
from .checkpoint_names import CheckpointTensor, Revert, Tensors, checkpoint_tensors_of, revert_of
from .gather_error import gather_error
from .parameter_gather import Weight, weights_of
from .reparametrization import refuse_computed
from .unwrap_model import unwrapped

BATCH_BYTES = 64 << 20
"""Bytes gathered together, unless one step or one FSDP1 instance has more: small tensors share one collective."""


@dataclass(frozen=True, slots=True)
class StateDictPart:
    """One tensor in memory, or one layer that PEFT has adapted: what it adds to the state dict, and from what."""

    inputs: tuple[int, ...]
    """Indices into the list of weights."""
    metas: Tensors
    """What it adds to the state dict, as tensors without data."""
    path: str = ""
    layer: torch.nn.Module | None = None
    """The adapted layer; None if the tensor is in the state dict as it is."""
    relative: tuple[str, ...] = ()
    """The names of `inputs` within `layer`."""

    @property
    def used(self) -> tuple[int, ...]:
        """Those of `inputs` that the result is made of: without adapters that are switched off."""
        if not getattr(self.layer, "disable_adapters", False):
            return self.inputs
        base = ("base_layer.", "original_module.")
        named = zip(self.inputs, self.relative, strict=True)
        return tuple(index for index, name in named if any(part in name for part in base)) or self.inputs

    def make(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        if self.layer is None:
            return dict(zip(self.metas, tensors, strict=True))
        merged = peft.merged(self.path, self.layer, dict(zip(self.relative, tensors, strict=True)))
        return {f"{self.path}.{name}" if self.path else name: tensor for name, tensor in merged.items()}


@dataclass(frozen=True, slots=True)
class ConversionStep:
    """What is converted together: the tensors of the checkpoint that have a part of the state dict in common."""

    parts: tuple[StateDictPart, ...]
    checkpoint_tensors: tuple[CheckpointTensor, ...]
    sent_as: tuple[str, ...]
    """The name that each checkpoint tensor is sent under."""
    revert: Revert

    @property
    def inputs(self) -> tuple[int, ...]:
        return tuple(index for part in self.parts for index in part.inputs)

    def run(self, tensors: Mapping[int, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors, under the names to send, from the gathered weights by their index."""
        state: Tensors = {}
        strides: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            state |= part.make([tensors[index] for index in part.inputs])
            strides |= {name: meta.stride() for name, meta in part.metas.items()}
        converted = self.revert(dict(state)) if any(not tensor.view for tensor in self.checkpoint_tensors) else {}
        for tensor, name in zip(self.checkpoint_tensors, self.sent_as, strict=True):
            if tensor.view:
                (source,) = tensor.sources
                yield name, tensor.of(state[source], strides[source])
            else:
                yield name, converted.pop(tensor.name)


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """The steps of one pass, in batches that are gathered together."""

    signature: Any
    """Equal for models that have the same plan."""
    batches: tuple[tuple[ConversionStep, ...], ...]
    ties: dict[str, str]
    """Sent names whose tensors are, now, the same memory in the same layout as an earlier one, and that one's name."""

    @property
    def checkpoint_tensors(self) -> Iterator[tuple[str, CheckpointTensor]]:
        """All tensors of a pass in its order, with the names that they are sent under."""
        for batch in self.batches:
            for step in batch:
                yield from zip(step.sent_as, step.checkpoint_tensors, strict=True)


def gather_plan_of(
    model: torch.nn.Module,
    last: GatherPlan | None,
    include: Callable[[str], bool] | None,
    rename: Callable[[str], str] | None,
) -> tuple[GatherPlan, list[Weight]]:
    """The plan for the model as it is now, and its weights. Returns `last` if that still fits."""
    peft.refuse_unmergeable(model)
    root = unwrapped(model)
    weights, layers = weights_of(model), peft.adapted_layers(root)
    conversions = id(getattr(root, "_weight_conversions", None))
    layouts = [(w.name, w.shape, w.stride, w.dtype, w.gather, w.live) for w in weights]
    groups = _tie_groups(weights)  # looked at anew each time: training code unties a head without another word
    signature = (id(root), conversions, layouts, groups, peft.state_of(layers))
    if last is not None and last.signature == signature:
        return last, weights
    ignored: set[str] = set(getattr(root, "_keys_to_ignore_on_save", None) or ())
    parts = [part for part in _state_dict_parts(weights, layers) if not ignored.issuperset(part.metas)]
    revert = revert_of(root)
    metas = {name: meta for part in parts for name, meta in part.metas.items()}
    tensors = [tensor for tensor in checkpoint_tensors_of(metas, revert) if include is None or include(tensor.name)]
    steps = _steps(parts, tensors, _sent_names(tensors, rename), revert)
    refuse_computed(root, (weights[index].name for step in steps for index in step.inputs))
    return GatherPlan(signature, tuple(_batches(steps, weights)), _ties(steps, groups)), weights


def _state_dict_parts(weights: Sequence[Weight], layers: Mapping[str, torch.nn.Module]) -> list[StateDictPart]:
    members: dict[str, list[int]] = {}
    parts: list[StateDictPart | str] = []
    for index, weight in enumerate(weights):
        path = _layer_path(weight.name, layers)
        if path is None:
            parts.append(StateDictPart((index,), {weight.name: weight.meta()}))
        else:
            if path not in members:
                parts.append(path)  # the layer's place in the order is that of its first weight
            members.setdefault(path, []).append(index)
    return [
        part if isinstance(part, StateDictPart) else _adapted_part(part, layers[part], members[part], weights)
        for part in parts
    ]


def _adapted_part(path: str, layer: torch.nn.Module, inputs: Sequence[int], weights: Sequence[Weight]) -> StateDictPart:
    relative = tuple(weights[index].name.removeprefix(f"{path}.") for index in inputs)
    part = StateDictPart(tuple(inputs), {}, path, layer, relative)
    return replace(part, metas=part.make([weights[index].meta() for index in inputs]))


def _tie_groups(weights: Sequence[Weight]) -> list[int]:
    """For each weight, the index of the first one that is the same tensor in memory, or begins at the same place."""
    first: dict[Any, int] = {}
    return [first.setdefault(_identity(weight), index) for index, weight in enumerate(weights)]


def _identity(weight: Weight) -> Any:
    if weight.live and (address := storage_address(weight.holder)):
        return address, weight.holder.storage_offset()
    return tuple(map(id, weight.holder[:1])) + weight.holder[1:] if type(weight.holder) is tuple else id(weight.holder)


def _ties(steps: Sequence[ConversionStep], groups: Sequence[int]) -> dict[str, str]:
    """See `GatherPlan.ties`. Two adapted layers give the same tensor if they are made of the same ones."""
    first: dict[Any, str] = {}
    ties: dict[str, str] = {}
    for step in steps:
        part_of = {name: part for part in step.parts for name in part.metas}
        for tensor, sent_as in zip(step.checkpoint_tensors, step.sent_as, strict=True):
            if not tensor.view:
                continue
            (source,) = tensor.sources
            part, meta = part_of[source], tensor.meta
            made_of = frozenset(groups[index] for index in part.used)
            layout = tuple(meta.shape), meta.stride(), meta.storage_offset(), meta.dtype
            key = part.layer is not None, made_of, layout
            if (name := first.setdefault(key, sent_as)) != sent_as:
                ties[sent_as] = name
    return ties


def _layer_path(name: str, layers: Mapping[str, Any]) -> str | None:
    """The path of the adapted layer that the weight is in."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in layers:
            return path
    return None


def _sent_names(tensors: Sequence[CheckpointTensor], rename: Callable[[str], str] | None) -> list[str]:
    names = [tensor.name if rename is None else rename(tensor.name) for tensor in tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"rename gives two tensors the name {twice!r}")
    return names


def _steps(
    parts: Sequence[StateDictPart], tensors: Sequence[CheckpointTensor], names: Sequence[str], revert: Revert
) -> list[ConversionStep]:
    """Parts and checkpoint tensors in the smallest groups that can be converted apart from each other."""
    part_of = {name: index for index, part in enumerate(parts) for name in part.metas}
    group_of = list(range(len(parts)))  # by part: the first part of its group
    for tensor in tensors:
        joined = {group_of[part_of[name]] for name in tensor.sources}
        if len(joined) > 1:
            group_of = [min(joined) if group in joined else group for group in group_of]
    members: dict[int, list[StateDictPart]] = {}
    for part, group in zip(parts, group_of, strict=True):
        members.setdefault(group, []).append(part)
    made: dict[int, list[tuple[CheckpointTensor, str]]] = {}
    for tensor, name in zip(tensors, names, strict=True):
        made.setdefault(group_of[part_of[min(tensor.sources)]], []).append((tensor, name))
    steps: list[ConversionStep] = []
    for group in sorted(made):
        checkpoint_tensors, sent_as = zip(*made[group], strict=True)
        steps.append(_checked(ConversionStep(tuple(members[group]), checkpoint_tensors, sent_as, revert)))
    return steps


def _checked(step: ConversionStep) -> ConversionStep:
    """The step, if converting its tensors alone gives what converting all of the model's tensors gave."""
    if not all(tensor.view for tensor in step.checkpoint_tensors):
        alone = step.revert({name: meta for part in step.parts for name, meta in part.metas.items()})
        for tensor in step.checkpoint_tensors:
            meta = alone.get(tensor.name)
            if meta is None or (meta.shape, meta.dtype) != (tensor.meta.shape, tensor.meta.dtype):
                problem = "transformers converts it together with other layers' tensors, which vgen cannot follow"
                raise gather_error(problem, tensor.name)
    return step


def _batches(steps: Sequence[ConversionStep], weights: Sequence[Weight]) -> Iterator[tuple[ConversionStep, ...]]:
    batch: list[ConversionStep] = []
    batch_bytes = 0
    batch_units: set[Any] = set()
    for step in steps:
        gathered = [weights[index] for index in step.inputs if not weights[index].live]
        bytes, units = sum(weight.bytes for weight in gathered), {weight.unit for weight in gathered} - {None}
        # Steps that share an FSDP1 instance stay together, however large the batch becomes: it is gathered whole.
        if batch and batch_bytes + bytes > BATCH_BYTES and not batch_units & units:
            yield tuple(batch)
            batch, batch_bytes, batch_units = [], 0, set()
        batch.append(step)
        batch_bytes += bytes
        batch_units |= units
    if batch:
        yield tuple(batch)
