"""From a transformers model's tensors in memory to those of a checkpoint: what `save_pretrained` would write.

transformers 5 renames and fuses parameters when it loads a checkpoint (the experts of a layer become one tensor), and
reverts that when it saves, by its own `revert_weight_conversion`. vgen runs that function once over tensors without
data, which shows what every tensor of the checkpoint is made of. From then on, tensors that are only parts of a
parameter are taken as views of it, and the library's function converts the others, group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .address_snapshot import storage_id
from .gather_error import gather_error
from .unwrap_model import clean

Tensors: TypeAlias = dict[str, torch.Tensor]
Revert: TypeAlias = Callable[[Tensors], Tensors]
"""From the tensors in memory to the checkpoint's, both by name."""


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of the checkpoint, and how it is made from the tensors in memory."""

    name: str
    sources: frozenset[str]
    """The names in memory of the tensors that it is made from."""
    meta: torch.Tensor
    """Without data: shape, dtype and, for a view, strides and offset."""
    view: bool
    """Whether it is a view of its one source."""

    def of(self, tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
        """The view of `tensor`, whose layout was `stride` when the conversion was traced."""
        if tensor.stride() != stride:
            tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        offset = tensor.storage_offset() + self.meta.storage_offset()
        return tensor.as_strided(self.meta.shape, self.meta.stride(), offset)


def revert_of(model: Any) -> Revert:
    """The function from a state dict in memory to the checkpoint's. Outside transformers it changes nothing."""
    if "PreTrainedModel" not in {kind.__name__ for kind in type(model).__mro__}:
        return dict
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, revert_weight_conversion
    except ImportError as error:
        if getattr(model, "_checkpoint_conversion_mapping", None):
            problem = f"the checkpoint names of a {type(model).__name__} are known to transformers 5 or newer"
            raise gather_error(problem) from error
        return dict  # transformers 4 has the checkpoint's names in memory
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # the model was never loaded: what `revert_weight_conversion` would compute at each call
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    if not conversions:
        return dict
    conversions = deepcopy(conversions)
    for conversion in conversions:
        if conversion.scope_prefix:
            conversion.scope_prefix = clean(f"{conversion.scope_prefix}.").removesuffix(".")

    def revert(tensors: Tensors) -> Tensors:
        return revert_weight_conversion(_ModelStandIn(model, conversions, tensors), tensors)  # pyright: ignore[reportArgumentType]

    return revert


class _ModelStandIn:
    """What the library's conversions read of a model. The real one may be sharded, or renamed by wrappers."""

    def __init__(self, model: Any, conversions: list[Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self.config = model.config
        self._weight_conversions = conversions
        self._tensors = tensors

    def get_parameter(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def checkpoint_tensors_of(metas: Tensors, revert: Revert) -> list[CheckpointTensor]:
    """What the checkpoint holds, from tensors without data under their names in memory."""
    try:
        converted, trace = _traced(metas, revert, elide_copies=True)
    except Exception:  # a conversion that needs its copies
        converted, trace = _traced(metas, revert, elide_copies=False)
    tensors = [
        CheckpointTensor(name, trace.origin(meta), meta, trace.is_view(meta)) for name, meta in converted.items()
    ]
    for tensor in tensors:
        if not tensor.sources:
            raise gather_error("transformers makes it of nothing in the model", tensor.name)
    return tensors


def _traced(metas: Tensors, revert: Revert, *, elide_copies: bool) -> tuple[Tensors, _Trace]:
    trace = _Trace(metas, elide_copies)
    with torch.no_grad(), trace:
        return revert(dict(metas)), trace


class _Trace(TorchDispatchMode):
    """Follows tensors without data through a conversion. If told to, it takes copies that reorder memory for views."""

    def __init__(self, inputs: Tensors, elide_copies: bool) -> None:
        super().__init__()
        self._elide_copies = elide_copies
        self._inputs = {storage_id(tensor): (name, tensor.dtype) for name, tensor in inputs.items()}
        self._origins = {storage_id(tensor): {name} for name, tensor in inputs.items()}
        self._alive: list[Any] = [inputs]  # the id of a freed storage could be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if func._schema.is_mutable and any(storage_id(tensor) in self._inputs for tensor in operands):
            raise gather_error(f"{func} would write into it")
        if self._elide_copies and func is torch.ops.aten.clone.default and kwargs.get("memory_format") is not None:
            return args[0]
        result = func(*args, **kwargs)
        sources = {name for tensor in operands for name in self.origin(tensor)}
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._alive.append(value)
                self._origins.setdefault(storage_id(value), set()).update(sources)
        return result

    def origin(self, tensor: torch.Tensor) -> frozenset[str]:
        """The names of the inputs that the tensor is made of."""
        return frozenset(self._origins.get(storage_id(tensor), ()))

    def is_view(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a view of one input."""
        return self._inputs.get(storage_id(tensor), ("", None))[1] == tensor.dtype
