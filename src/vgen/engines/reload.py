"""vLLM's layerwise reload of an engine in this process, made to fail cleanly.

It puts all layers on the meta device, lets the model's own loader fill them, and copies the result into
the tensors that the kernels hold. An error in the middle leaves layers on the meta device, where the next
scheduler step ends the engine and the next reload goes wrong; so here every layer gets its tensors back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class NamedStream:
    """Iterates and remembers which name is behind which tensor: an error of a loader says only a shape."""

    def __init__(self, weights: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        self._weights = weights
        self._names: dict[int, str] = {}
        self.given: set[str] = set()
        """All names given out so far."""
        self.last: str | None = None
        """The name last given out, None once all have been; after an error, the one it concerns where known."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            self.last = name
            self.given.add(name)
            self._names.setdefault(tensor.data_ptr(), name)
            yield name, tensor
        self.last = None

    def name_of(self, tensor: Any) -> str | None:
        """The name that `tensor`, or what it is a view of, was given out under."""
        return self._names.get(tensor.data_ptr()) if isinstance(tensor, torch.Tensor) else None

    def follow(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Go on with `weights`."""
        self._weights = weights

    def moved(self, names: dict[int, str]) -> None:
        """What was given out so far lives at these addresses now, or is no longer needed."""
        self._names = names


class Reload:
    """A layerwise reload whose weights come in parts: `start`, `load` for each of them, `finish`.

    Whatever raises, `cancel` included, leaves every layer with the tensors that it had before, their content
    perhaps mixed. The caller's part may be overwritten once `load` has returned.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any) -> None:
        self._model, self._config = model, model_config
        self.stream = NamedStream()
        """After an error its `last` is the name that the error concerns, where known."""
        self._loaded: set[str] | None = set()
        self._kept: dict[int, str] = {}
        self._expert_kernels: dict[Any, Any] = {}
        self._expected = [name.replace(".base_layer.", ".") for name, _ in model.named_parameters()]

    @torch.no_grad()
    def start(self) -> None:
        """Put all layers on the meta device. No scheduler step may run until `finish`."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with self._all_or_nothing():
            self._forget_packed_experts()
            initialize_layerwise_reload(self._model)

    @torch.no_grad()
    def load(self, stream: NamedStream) -> None:
        """Run the model's own loader over all of the stream."""
        self.stream = stream
        with self._all_or_nothing():
            loaded = self._model.load_weights(stream)  # pyright: ignore[reportCallIssue]
            self._loaded = None if loaded is None or self._loaded is None else self._loaded | set(loaded)

    def load_part(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load one part of the stream; what a layer must hold on to until its other parts come is copied."""
        self.stream.follow(weights)
        self.load(self.stream)
        self._kept = self._copies()
        self.stream.moved(dict(self._kept))

    @torch.no_grad()
    def finish(self) -> tuple[str, ...]:
        """Put the layers to use; returns the parameters that nothing was loaded into."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self._all_or_nothing():
            missing = tuple(self._missing())
            finalize_layerwise_reload(self._model, self._config)
        return missing

    def cancel(self) -> None:
        """Give every layer its tensors back."""
        _put_back(self._model)
        for method, kernel in self._expert_kernels.items():
            method.moe_kernel = method.moe_kernel or kernel
        self._expert_kernels.clear()

    def _forget_packed_experts(self) -> None:
        """Have experts packed again on a CPU.

        vLLM packs them when it makes their kernel, and in a reload that is there already: they would be left
        unpacked where packed ones are expected, and give wrong numbers without a word.
        """
        for layer in self._model.modules():
            method: Any = getattr(layer, "quant_method", None)
            weight = getattr(layer, "w13_weight", None)
            if getattr(method, "moe_kernel", None) is not None and weight is not None and weight.device.type == "cpu":
                self._expert_kernels[method] = method.moe_kernel
                method.moe_kernel = None

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self.stream.last is None and isinstance(error, Exception):
                self.stream.last = _culprit(self._model, self.stream)
            self.cancel()
            raise

    def _missing(self) -> Iterator[str]:
        if self._loaded is None or self._config.quantization is not None:
            return
        yield from (name for name in self._expected if name not in self._loaded)
        yield from _missing_parts(self._model, self.stream.given)

    def _copies(self) -> dict[int, str]:
        """Copy what layers hold on to, where that has not been done; returns the copies' addresses and names."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        kept: dict[int, str] = {}

        def copy(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and not value.is_meta:
                name = self.stream.name_of(value) or ""
                value = value if value.data_ptr() in self._kept else value.clone()
                kept[value.data_ptr()] = name
            elif isinstance(value, tuple | list):
                return type(value)(copy(item) for item in value)
            elif isinstance(value, dict):
                return {key: copy(item) for key, item in value.items()}
            return value

        for layer in self._model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if name != "param":
                        call.arguments[name] = copy(value)
        return kept


def reload(runner: Any, stream: NamedStream) -> tuple[str, ...]:
    """Load the stream into the runner's model; returns the engine's parameters that nothing was loaded into."""
    steps = Reload(runner.get_model(), runner.model_config)
    try:
        steps.start()
        steps.load(stream)
        missing = steps.finish()
    except BaseException:
        steps.cancel()
        raise
    runner.reset_lora_state()
    return missing


def _missing_parts(model: torch.nn.Module, given: set[str]) -> Iterator[str]:
    """What layers that the engine has fused (q, k and v into one) still wait for: half a layer counts as loaded."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    for path, layer in model.named_modules():
        info = get_layerwise_info(layer)
        parent, _, leaf = path.removesuffix(".base_layer").rpartition(".")
        if leaf not in fused or not info.can_load() or not 0 < info.load_numel < (info.load_numel_total or 0):
            continue
        wanted = [f"{parent}.{part}.{name}" for part in fused[leaf] for name in get_layer_tensors(layer)]
        yield from [name for name in wanted if name not in given] or [path]


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
