"""How a model's tensors become its checkpoint's: which are gathered together, merged, converted, in what order.

A plan holds no tensor of the model. It is made from shapes alone, the same on every rank, and made anew when
the model has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import WeightSyncError
from . import peft
from .checkpoint_names import Revert, Target, Tensors, revert_of, targets_of
from .names import unwrapped
from .sharded import Weight, weights_of

BATCH_BYTES = 64 << 20
"""Gathered together, unless a single step or FSDP1 instance is larger: one collective for many small tensors."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor in memory, or a layer that PEFT has adapted: some of the state dict, and what it takes."""

    inputs: tuple[int, ...]
    """Places in the list of weights."""
    metas: Tensors
    path: str = ""
    layer: torch.nn.Module | None = None
    """None where the tensor is as it is in the state dict."""
    relative: tuple[str, ...] = ()
    """The names of `inputs` within `layer`."""

    def make(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        if self.layer is None:
            return dict(zip(self.metas, tensors, strict=True))
        made = peft.merged(self.path, self.layer, dict(zip(self.relative, tensors, strict=True)))
        return {f"{self.path}.{name}" if self.path else name: tensor for name, tensor in made.items()}


@dataclass(frozen=True, slots=True)
class Step:
    """What is made together: the tensors of the checkpoint that share a piece."""

    pieces: tuple[Piece, ...]
    targets: tuple[Target, ...]
    sent_as: tuple[str, ...]
    revert: Revert

    @property
    def inputs(self) -> tuple[int, ...]:
        return tuple(index for piece in self.pieces for index in piece.inputs)

    def run(self, tensors: Mapping[int, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors for the checkpoint, from those of the weights by their places."""
        made: Tensors = {}
        strides: dict[str, tuple[int, ...]] = {}
        for piece in self.pieces:
            made |= piece.make([tensors[index] for index in piece.inputs])
            strides |= {name: meta.stride() for name, meta in piece.metas.items()}
        converted = self.revert(dict(made)) if any(not target.view for target in self.targets) else {}
        for target, name in zip(self.targets, self.sent_as, strict=True):
            if target.view:
                (source,) = target.sources
                yield name, target.of(made[source], strides[source])
            else:
                yield name, converted.pop(target.name)


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in batches that are gathered together."""

    signature: Any
    batches: tuple[tuple[Step, ...], ...]

    @property
    def targets(self) -> Iterator[tuple[str, Target]]:
        """In the order of the stream, with the names they are sent under."""
        for batch in self.batches:
            for step in batch:
                yield from zip(step.sent_as, step.targets, strict=True)


def look(
    model: torch.nn.Module,
    last: Plan | None,
    include: Callable[[str], bool] | None,
    rename: Callable[[str], str] | None,
) -> tuple[Plan, list[Weight]]:
    """The model's weights as they are now, and the plan for them: `last` where it still fits."""
    peft.refuse_unmergeable(model)
    root = unwrapped(model)
    weights, layers = weights_of(model), peft.adapted_layers(root)
    conversions = id(getattr(root, "_weight_conversions", None))
    parts = [(w.name, w.shape, w.stride, w.dtype, w.gather, w.live) for w in weights]
    signature = (id(root), conversions, parts, peft.state_of(layers))
    if last is not None and last.signature == signature:
        return last, weights
    ignored: set[str] = set(getattr(root, "_keys_to_ignore_on_save", None) or ())
    _refuse_half_tied(root, weights, layers)
    pieces = [piece for piece in _pieces(weights, layers) if not ignored.issuperset(piece.metas)]
    revert = revert_of(root)
    steps = _steps(pieces, revert, include, rename)
    return Plan(signature, tuple(_batches(steps, weights))), weights


def _pieces(weights: Sequence[Weight], layers: Mapping[str, torch.nn.Module]) -> list[Piece]:
    inside: dict[str, list[int]] = {}
    found: list[Piece | str] = []
    for index, weight in enumerate(weights):
        path = _layer_path(weight.name, layers)
        if path is None:
            found.append(Piece((index,), {weight.name: weight.meta()}))
        else:
            if path not in inside:
                found.append(path)
            inside.setdefault(path, []).append(index)
    return [
        piece if isinstance(piece, Piece) else _adapted(piece, layers[piece], inside[piece], weights) for piece in found
    ]


def _refuse_half_tied(root: Any, weights: Sequence[Weight], layers: Mapping[str, Any]) -> None:
    """An adapter on one name of a tied weight unties it for the trainer, and an engine that ties cannot follow."""
    config = getattr(root, "config", None)
    if not layers or not getattr(config, "tie_word_embeddings", False):
        return
    free = {_identity(weight): weight.name for weight in weights if _layer_path(weight.name, layers) is None}
    for weight in weights:
        path = _layer_path(weight.name, layers)
        if path is not None and not layers[path].disable_adapters and (other := free.get(_identity(weight))):
            raise WeightSyncError(
                f"it is tied to {other!r}, which has no adapter: PEFT's ensure_weight_tying=True gives it the same one",
                phase="gather",
                parameter=path,
                receiver="trainer",
            )


def _identity(weight: Weight) -> Any:
    return tuple(map(id, weight.holder[:1])) + weight.holder[1:] if type(weight.holder) is tuple else id(weight.holder)


def _layer_path(name: str, layers: Mapping[str, Any]) -> str | None:
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in layers:
            return path
    return None


def _adapted(path: str, layer: torch.nn.Module, inputs: Sequence[int], weights: Sequence[Weight]) -> Piece:
    relative = tuple(weights[index].name.removeprefix(f"{path}.") for index in inputs)
    piece = Piece(tuple(inputs), {}, path, layer, relative)
    return replace(piece, metas=piece.make([weights[index].meta() for index in inputs]))


def _steps(
    pieces: Sequence[Piece],
    revert: Revert,
    include: Callable[[str], bool] | None,
    rename: Callable[[str], str] | None,
) -> list[Step]:
    metas = {name: meta for piece in pieces for name, meta in piece.metas.items()}
    holder = {name: index for index, piece in enumerate(pieces) for name in piece.metas}
    targets = [target for target in targets_of(metas, revert) if include is None or include(target.name)]
    names = [target.name if rename is None else rename(target.name) for target in targets]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"rename gives two tensors the name {twice!r}")
    together = _Together(len(pieces))
    for target in targets:
        together.join([holder[name] for name in target.sources])
    groups: dict[int, list[int]] = {}
    for number, target in enumerate(targets):
        groups.setdefault(together.of(holder[min(target.sources)]), []).append(number)
    members: dict[int, list[int]] = {}
    for index in range(len(pieces)):
        members.setdefault(together.of(index), []).append(index)
    steps: list[Step] = []
    for group in sorted(groups):
        step = Step(
            tuple(pieces[index] for index in members[group]),
            tuple(targets[number] for number in groups[group]),
            tuple(names[number] for number in groups[group]),
            revert,
        )
        _check(step)
        steps.append(step)
    return steps


def _check(step: Step) -> None:
    """Converting the step's tensors alone must give what converting all of them gave."""
    if all(target.view for target in step.targets):
        return
    alone = step.revert({name: meta for piece in step.pieces for name, meta in piece.metas.items()})
    for target in step.targets:
        found = alone.get(target.name)
        if found is None or (found.shape, found.dtype) != (target.meta.shape, target.meta.dtype):
            raise WeightSyncError(
                "transformers converts it together with other layers' tensors, which vgen cannot follow",
                phase="gather",
                parameter=target.name,
                receiver="trainer",
            )


def _batches(steps: Sequence[Step], weights: Sequence[Weight]) -> Iterator[tuple[Step, ...]]:
    batch: list[Step] = []
    size = 0
    units: set[Any] = set()
    for step in steps:
        gathered = [weights[index] for index in step.inputs if not weights[index].live]
        bytes, own = sum(weight.bytes for weight in gathered), {weight.unit for weight in gathered} - {None}
        if batch and size + bytes > BATCH_BYTES and not units & own:
            yield tuple(batch)
            batch, size, units = [], 0, set()
        batch.append(step)
        size += bytes
        units |= own
    if batch:
        yield tuple(batch)


class _Together:
    """Which pieces have been joined, by the first of them."""

    def __init__(self, count: int) -> None:
        self._first = list(range(count))

    def of(self, index: int) -> int:
        while self._first[index] != index:
            index = self._first[index]
        return index

    def join(self, indices: Sequence[int]) -> None:
        firsts = sorted({self.of(index) for index in indices})
        for other in firsts[1:]:
            self._first[other] = firsts[0]
