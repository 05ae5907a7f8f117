"""What a model's loader writes into its parameters by itself, during vLLM's layerwise reload.

The reload counts what the loaders of parameters write. Some models copy into parameters directly, as gpt-oss does with
experts and sinks. During a reload these are on the meta device: the copies would do nothing, and the reload would put
the old tensors back, or garbage in the place of what it did not see. Here such a write goes to memory, and is counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils._pytree import tree_map_only

from ..source.address_snapshot import storage_id
from .load_recorder import written_tensors
from .tensor_accounting import Spans


@contextmanager
def _unseen_loaders() -> Generator[None]:
    """A block in which `DirectWrites` does not see what the loaders of parameters write: vLLM counts that itself."""
    layerwise: Any = import_module("vllm.model_executor.model_loader.reload.layerwise")
    before = layerwise.get_numel_loaded, layerwise._layerwise_process
    layerwise.get_numel_loaded, layerwise._layerwise_process = map(_without_modes, before)
    try:
        yield
    finally:
        layerwise.get_numel_loaded, layerwise._layerwise_process = before


def _without_modes(function: Any) -> Any:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


class DirectWrites(TorchDispatchMode):
    """While it is active, operations that write into parameters on the meta device write into memory.

    Make it once the reload has put all layers on the meta device. Their memory is allocated at the first such write,
    and a layer is finished as soon as all its elements have come, as vLLM does for others.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        from vllm.model_executor.layers.attention import is_deferred_attention_layer
        from vllm.model_executor.model_loader.reload import layerwise

        self._layerwise: Any = layerwise
        self._places: dict[int, tuple[torch.nn.Module, str]] = {}
        self._alive: list[torch.Tensor] = []  # the id of a storage that is freed may come again
        self._written: defaultdict[tuple[torch.nn.Module, str], Spans] = defaultdict(Spans)
        for layer in model.modules():
            if layerwise.get_layerwise_info(layer).can_load() and not is_deferred_attention_layer(layer):
                self._note(layer)

    @contextmanager
    def seen(self) -> Generator[None]:
        """A block in which the model's loader runs."""
        with _unseen_loaders(), self:
            yield

    def _note(self, layer: torch.nn.Module) -> None:
        from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

        for name, tensor in self._layerwise.get_layer_tensors(layer).items():
            if name not in SKIP_TENSORS:
                self._places[storage_id(tensor)] = layer, name
                self._alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [each for each in written_tensors(func, args, kwargs) if storage_id(each) in self._places]
        if not written:
            return func(*args, **kwargs)
        layers = list(dict.fromkeys(self._places[storage_id(each)][0] for each in written))
        for layer in layers:
            info = self._layerwise.get_layerwise_info(layer)
            if not info.can_load():
                raise RuntimeError(f"the loader writes into {type(layer).__name__} after it was complete")
            if written[0].is_meta:
                self._layerwise.materialize_layer(layer, info)
                self._note(layer)
        in_memory = tree_map_only(torch.Tensor, self._in_memory, (args, kwargs))
        func(*in_memory[0], **in_memory[1])
        for each in written:
            self._count(each)
        for layer in layers:
            info = self._layerwise.get_layerwise_info(layer)
            if info.load_numel >= info.load_numel_total:
                self._layerwise._layerwise_process(layer, info)
                self._alive = [each for each in self._alive if each.is_meta or self._layer_of(each) is not layer]
        return args[0]

    def _layer_of(self, tensor: torch.Tensor) -> torch.nn.Module | None:
        return self._places.get(storage_id(tensor), (None, ""))[0]

    def _count(self, tensor: torch.Tensor) -> None:
        """Count the elements that are written for the first time."""
        layer, name = self._places[storage_id(tensor)]
        info, spans = self._layerwise.get_layerwise_info(layer), self._written[layer, name]
        before = spans.elements(tensor.element_size())
        spans.add(Spans.of(tensor))
        info.load_numel += spans.elements(tensor.element_size()) - before
        info.load_numel_total = self._layerwise.get_layer_size(layer)

    def _in_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same elements of the parameter that has memory now."""
        layer, name = self._places.get(storage_id(tensor), (None, ""))
        if layer is None or not tensor.is_meta:
            return tensor
        return getattr(layer, name).data.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
