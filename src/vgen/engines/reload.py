"""vLLM's layerwise reload of an engine in this process, made to fail cleanly.

It puts all layers on the meta device, lets the model's own loader fill them, and copies the result into
the tensors that the kernels hold. An error in the middle leaves layers on the meta device, where the next
scheduler step ends the engine and the next reload goes wrong; so here every layer gets its tensors back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


class NamedStream:
    """Iterates and remembers which name is behind which tensor: an error of a loader says only a shape."""

    def __init__(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._weights = weights
        self._names: dict[int, str] = {}
        self.last: str | None = None
        """The name last given out, None once all have been; after an error, the one it concerns where known."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            self.last = name
            self._names.setdefault(tensor.data_ptr(), name)
            yield name, tensor
        self.last = None

    def name_of(self, tensor: Any) -> str | None:
        """The name that `tensor`, or what it is a view of, was given out under."""
        return self._names.get(tensor.data_ptr()) if isinstance(tensor, torch.Tensor) else None


@torch.no_grad()
def reload(runner: Any, stream: NamedStream) -> tuple[str, ...]:
    """Load the stream into the runner's model; returns the engine's parameters that nothing was loaded into."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = runner.get_model()
    expected = [name.replace(".base_layer.", ".") for name, _ in model.named_parameters()]
    try:
        initialize_layerwise_reload(model)
        loaded = model.load_weights(stream)
        finalize_layerwise_reload(model, runner.model_config)
    except BaseException as error:
        if stream.last is None and isinstance(error, Exception):
            stream.last = _culprit(model, stream)
        _put_back(model)
        raise
    runner.reset_lora_state()
    if loaded is None or runner.model_config.quantization is not None:
        return ()
    return tuple(name for name in expected if name not in loaded)


def _culprit(model: torch.nn.Module, stream: NamedStream) -> str | None:
    """The tensor that the layer in hand cannot take, by loading its buffered tensors once more, one by one."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for path, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load():
            continue
        for name, call in info.loaded_weights:
            parameter = getattr(layer, name)
            call.arguments["param"] = parameter
            try:
                parameter.weight_loader(*call.args, **call.kwargs)
            except Exception:
                tensors = [found for value in call.arguments.values() if (found := stream.name_of(value))]
                return tensors[0] if tensors else f"{path}.{name}"
    return None


def _put_back(model: torch.nn.Module) -> None:
    """Give every layer that is still being reloaded the tensors that it had before. Their content may be mixed."""
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(layer, info)
        info.reset()
