"""From a transformers model's tensors in memory to those of a checkpoint: what `save_pretrained` would write.

transformers 5 renames and fuses parameters when it loads a checkpoint (a layer's experts become one tensor) and
turns that around when it saves. The turning around is the library's own `revert_weight_conversion`. Here it runs
once over tensors without data, which shows what every tensor of the checkpoint is made of; from then on the ones
that are only parts of a parameter are taken as views of it, and the library converts what is left, group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import WeightSyncError
from .names import clean

Tensors: TypeAlias = dict[str, torch.Tensor]
Revert: TypeAlias = Callable[[Tensors], Tensors]


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the checkpoint, and how it is had from the tensors in memory."""

    name: str
    sources: frozenset[str]
    """The names in memory that it is made from."""
    meta: torch.Tensor
    """Shape, dtype and, for a view, strides and offset."""
    view: bool
    """Whether it is a view of its one source."""

    def of(self, tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
        """The view of `tensor`, which was laid out as `stride` when this was found."""
        if tensor.stride() != stride:
            tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        offset = tensor.storage_offset() + self.meta.storage_offset()
        return tensor.as_strided(self.meta.shape, self.meta.stride(), offset)


def revert_of(model: Any) -> Revert:
    """The function from a state dict in memory to the checkpoint's. Names stay as they are outside transformers."""
    if "PreTrainedModel" not in {kind.__name__ for kind in type(model).__mro__}:
        return dict
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, revert_weight_conversion
    except ImportError as error:
        if getattr(model, "_checkpoint_conversion_mapping", None):
            raise WeightSyncError(
                f"the checkpoint names of a {type(model).__name__} are known to transformers 5 or newer",
                phase="gather",
                receiver="trainer",
            ) from error
        return dict  # transformers 4 has the checkpoint's names in memory
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # never loaded: as `revert_weight_conversion` does it, but only once
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [found for found in conversions if not isinstance(found, PrefixChange)]
    if not conversions:
        return dict
    conversions = deepcopy(conversions)
    for conversion in conversions:
        if conversion.scope_prefix:
            conversion.scope_prefix = clean(f"{conversion.scope_prefix}.").removesuffix(".")

    def revert(tensors: Tensors) -> Tensors:
        return revert_weight_conversion(_Stand(model, conversions, tensors), tensors)  # pyright: ignore[reportArgumentType]

    return revert


class _Stand:
    """Stands for the model in the library's conversions: its parameters may be in parts, or renamed by wrappers."""

    def __init__(self, model: Any, conversions: list[Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self.config = model.config
        self._weight_conversions = conversions
        self._tensors = tensors

    def get_parameter(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def targets_of(metas: Tensors, revert: Revert) -> list[Target]:
    """What the checkpoint holds, from tensors without data under the names in memory."""
    try:
        found, trace = _traced(metas, revert, elide=True)
    except Exception:  # a conversion that needs its copies
        found, trace = _traced(metas, revert, elide=False)
    targets = [Target(name, trace.origin(meta), meta, trace.is_view(meta)) for name, meta in found.items()]
    for target in targets:
        if not target.sources:
            raise WeightSyncError(
                "transformers makes it of nothing in the model",
                phase="gather",
                parameter=target.name,
                receiver="trainer",
            )
    return targets


def _traced(metas: Tensors, revert: Revert, *, elide: bool) -> tuple[Tensors, _Trace]:
    trace = _Trace(metas, elide)
    with torch.no_grad(), trace:
        return revert(dict(metas)), trace


class _Trace(TorchDispatchMode):
    """Follows tensors without data through a conversion. With `elide`, copies that only reorder memory are views."""

    def __init__(self, inputs: Tensors, elide: bool) -> None:
        super().__init__()
        self._elide = elide
        self._inputs = {_storage(tensor): (name, tensor.dtype) for name, tensor in inputs.items()}
        self._origins = {_storage(tensor): {name} for name, tensor in inputs.items()}
        self._kept: list[Any] = [inputs]  # a storage's address may not be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if func._schema.is_mutable and any(_storage(tensor) in self._inputs for tensor in given):
            raise WeightSyncError(f"{func} would write into it", phase="gather", receiver="trainer")
        if self._elide and func is torch.ops.aten.clone.default and kwargs.get("memory_format") is not None:
            return args[0]
        result = func(*args, **kwargs)
        sources = {name for tensor in given for name in self.origin(tensor)}
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._kept.append(value)
                self._origins.setdefault(_storage(value), set()).update(sources)
        return result

    def origin(self, tensor: torch.Tensor) -> frozenset[str]:
        """The inputs that it is made of."""
        return frozenset(self._origins.get(_storage(tensor), ()))

    def is_view(self, tensor: torch.Tensor) -> bool:
        """Whether it is only a part of an input."""
        return self._inputs.get(_storage(tensor), ("", None))[1] == tensor.dtype


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
