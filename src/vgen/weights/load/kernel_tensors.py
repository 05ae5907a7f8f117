"""Tensors that an engine's kernels read: which there are, and that a reload leaves them at their old addresses.

A captured CUDA graph reads the addresses that it was captured with. vLLM's reload copies into the tensors that modules
register, but objects beside the modules (attention backends, kernels of experts, quantization methods) may make new
ones after each load, and the graphs go on with the old ones.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import WeightSyncError
from ..source.address_snapshot import storage_address
from .weight_layout_allowlist import METHODS

DEPTH = 4
"""How many objects may lie between a module and a tensor."""
_NOT_OF_WEIGHTS = frozenset({"kv_cache", "kv_caches", "_forward_hooks", "weight_loader"})


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor, and the table that holds it: attributes of an object, a dictionary or a list."""

    path: str
    table: Any
    key: Any
    tensor: torch.Tensor


def held_tensors(model: torch.nn.Module) -> Iterator[HeldTensor]:
    """All tensors that modules hold, registered or not, also through objects of vLLM's, except the KV cache."""
    seen = set[int]()
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield HeldTensor(f"{path}.{name}", table, name, tensor)
        rest = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers")}
        yield from _in_table(path, vars(module), rest, seen, DEPTH)


def _in_table(path: str, table: Any, items: dict[Any, Any], seen: set[int], depth: int) -> Iterator[HeldTensor]:
    for key, value in items.items():
        if key in _NOT_OF_WEIGHTS or isinstance(value, torch.nn.Module):
            continue
        where = f"{path}.{key}"
        if isinstance(value, torch.Tensor):
            yield HeldTensor(where, table, key, value)
        elif depth and id(value) not in seen and (inner := _items_of(value)) is not None:
            seen.add(id(value))
            yield from _in_table(where, inner[0], inner[1], seen, depth - 1)


def _items_of(value: Any) -> tuple[Any, dict[Any, Any]] | None:
    """What may hold tensors in an object, and as what: a dict, a list, or the attributes of an object of vLLM's."""
    if isinstance(value, MutableMapping):
        return value, dict(value)
    if isinstance(value, MutableSequence):
        return value, dict(enumerate(value))
    if (
        type(value).__module__.startswith("vllm")
        and hasattr(value, "__dict__")
        and "Config" not in type(value).__name__
    ):
        return vars(value), dict(vars(value))
    return None


class KernelTensors:
    """The tensors of a model at one moment, which CUDA graphs read: to be put back in place after a load."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._before = {held.path: (held.tensor, held.tensor.data_ptr()) for held in held_tensors(model)}

    def put_back(self) -> None:
        """Give every tensor its old address, with its new content. Raises `WeightSyncError` in phase `load`."""
        for held in list(held_tensors(self._model)):
            old, address = self._before.get(held.path, (held.tensor, 0))
            new = held.tensor
            if not address or new.is_meta or new.data_ptr() == address:
                continue
            if old.data_ptr() == address and _layout(old) == _layout(new):
                old.data.copy_(new)
                held.table[held.key] = old
            else:
                problem = (
                    f"the engine's reload has moved it and changed its layout from {_layout(old)} to {_layout(new)}, "
                    "and CUDA graphs still read the old one: start the engine with enforce_eager=True"
                )
                raise WeightSyncError(problem, phase="load", parameter=held.path)


def follow_tied(model: torch.nn.Module, not_loaded: Sequence[torch.nn.Module]) -> None:
    """Have layers that share a weight with a loaded layer compute again what their kernels read.

    On a CPU an output head keeps its weight in packed form, and vLLM packs it only when the head itself is loaded.
    """
    passive = set(map(id, not_loaded))
    loaded = {
        storage_address(tensor)
        for module in model.modules()
        if id(module) not in passive
        for tensor in module._parameters.values()
        if tensor is not None
    } - {0}
    for module in not_loaded:
        shares = any(t is not None and storage_address(t) in loaded for t in module._parameters.values())
        method: Any = getattr(module, "quant_method", None)
        if shares and type(method).__name__ in METHODS:
            method.process_weights_after_loading(module)


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
