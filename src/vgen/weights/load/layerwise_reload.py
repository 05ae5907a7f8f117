"""vLLM's layerwise reload of an engine in this process, with a cleanup after errors that vLLM's own lacks.

The reload puts all layers on the meta device, lets the model's own loader fill them, and copies the result into the
tensors that the kernels hold. In vLLM an error in the middle leaves layers on the meta device: the next scheduler step
ends the engine, and the next reload goes wrong. Here every layer gets its tensors back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from ...errors import WeightSyncError
from ..verification.bit_check import NotFinite
from .direct_writes import DirectWrites
from .kernel_tensors import KernelTensors, follow_tied

Layouts: TypeAlias = "Mapping[str, tuple[tuple[int, ...], torch.dtype]]"
"""Shape and dtype of tensors, by name."""


def not_as_said(layouts: Layouts, name: str, tensor: torch.Tensor) -> str:
    """What is wrong with a tensor whose layout is not that of `layouts`."""
    shape, dtype = layouts.get(name, ((), None))
    expected = "no such tensor" if dtype is None else f"{list(shape)} in {dtype}"
    return f"a size of {list(tensor.shape)} in {tensor.dtype} came, where {expected} was said to come"


class NamedStream:
    """A stream of named tensors that remembers the name of each tensor: a loader's error names only a shape.

    Args:
        weights: Names and tensors.
        layouts: The shape and dtype that each name must have; a tensor that is not as said, or does not come, is an
            error. None if that is unknown.
        without: Names that are left out.
        finite: Whether each tensor is examined for values that are not finite, which takes a read of all bytes.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, torch.Tensor]] = (),
        *,
        layouts: Layouts | None = None,
        without: Set[str] = frozenset(),
        finite: bool = False,
    ) -> None:
        self._weights, self._without, self._layouts = weights, without, layouts
        self._missing = set(layouts or ()) - without
        self.given: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        """Shape and dtype of what was yielded so far."""
        self._names: dict[int, str] = {}
        self.not_finite = NotFinite() if finite else None
        """Which of the tensors yielded so far are not finite, if that was asked for."""
        self.last: str | None = None
        """The name yielded last, None after the end; after an error, the name that it concerns, if known."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            if name in self._without:
                continue
            self.last = name
            self._require_as_said(name, tensor)
            if self.not_finite is not None:
                self.not_finite.check(name, tensor)
            self._names.setdefault(tensor.data_ptr(), name)
            yield name, tensor
        self.last = None

    def _require_as_said(self, name: str, tensor: torch.Tensor) -> None:
        self._missing.discard(name)
        self.given[name] = tuple(tensor.shape), tensor.dtype
        if self._layouts is not None and self._layouts.get(name) != (tuple(tensor.shape), tensor.dtype):
            raise WeightSyncError(not_as_said(self._layouts, name, tensor), phase="load", parameter=name)

    def require_all(self) -> None:
        """Raise unless every name of `layouts` has come."""
        if self._missing:
            name = min(self._missing)
            problem = f"the trainer's model does not provide it ({len(self._missing)} such)"
            raise WeightSyncError(problem, phase="load", parameter=name)

    def name_of(self, tensor: Any) -> str | None:
        """The name under which `tensor`, or the tensor that it is a view of, was yielded."""
        return self._names.get(tensor.data_ptr()) if isinstance(tensor, torch.Tensor) else None

    def follow(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Continue the stream with `weights`."""
        self._weights = weights

    def moved(self, names: dict[int, str]) -> None:
        """Replace the known addresses by `names`: tensors yielded so far are there now, or are no longer needed."""
        self._names = names


class Reload:
    """A layerwise reload whose weights may come in parts: `start`, `load` or `load_part` for each part, `finish`.

    `options` are those of the `NamedStream` that joins the parts.

    After any error, and after `cancel`, every layer has its old tensors again; their content may be a mix of old and
    new. The memory of a part may be overwritten as soon as `load_part` has returned.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any, **options: Any) -> None:
        self._model, self._config = model, model_config
        self.stream = NamedStream(**options)
        """After an error, its `last` is the name that the error concerns, if known."""
        self._buffered: dict[int, str] = {}
        """Copies of tensors that incomplete layers wait with: their names by address."""
        self._expert_kernels: dict[Any, Any] = {}
        self._before: KernelTensors | None = None
        self._direct_writes: DirectWrites

    @torch.no_grad()
    def start(self) -> None:
        """Put all layers on the meta device. No scheduler step may run until `finish`."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with self._all_or_nothing():
            graphs = next(self._model.parameters()).is_cuda and not self._config.enforce_eager
            self._before = KernelTensors(self._model) if graphs else None
            self._forget_packed_experts()
            initialize_layerwise_reload(self._model)
            self._direct_writes = DirectWrites(self._model)

    @torch.no_grad()
    def load(self, stream: NamedStream) -> None:
        """Run the model's own loader over the stream."""
        self.stream = stream
        with self._all_or_nothing(), self._direct_writes.seen():
            self._model.load_weights(stream)  # pyright: ignore[reportCallIssue]

    def load_part(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load one part of the stream. Tensors that wait for other parts of their layer are copied."""
        self.stream.follow(weights)
        self.load(self.stream)
        self._buffered = self._copy_buffered()
        self.stream.moved(dict(self._buffered))

    @torch.no_grad()
    def finish(self) -> None:
        """Put the new weights to use."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        with self._all_or_nothing():
            self.stream.require_all()
            infos = [(layer, get_layerwise_info(layer)) for layer in self._model.modules()]
            not_loaded = [layer for layer, info in infos if info.can_load() and info.load_numel <= 0]
            finalize_layerwise_reload(self._model, self._config)
            follow_tied(self._model, not_loaded)
            if self._before is not None:
                self._before.put_back()
                self._before = None

    def cancel(self) -> None:
        """Give every layer its tensors back."""
        _put_back(self._model)
        for method, kernel in self._expert_kernels.items():
            method.moe_kernel = method.moe_kernel or kernel
        self._expert_kernels.clear()

    def _forget_packed_experts(self) -> None:
        """Make vLLM pack experts again, on a CPU.

        vLLM packs experts when it creates their kernel. In a reload the kernel exists already: the experts would stay
        unpacked where the kernel expects packed ones, and silently give wrong results.
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

    def _copy_buffered(self) -> dict[int, str]:
        """Copy the tensors that layers wait with, if not done before; returns the copies' names by address."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        names: dict[int, str] = {}

        def copy(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and not value.is_meta:
                name = self.stream.name_of(value) or ""
                value = value if value.data_ptr() in self._buffered else value.clone()
                names[value.data_ptr()] = name
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
        return names


def reload(runner: Any, stream: NamedStream) -> None:
    """Load the stream into the runner's model."""
    steps = Reload(runner.get_model(), runner.model_config)
    try:
        steps.start()
        steps.load(stream)
        steps.finish()
    except BaseException:
        steps.cancel()
        raise
    runner.reset_lora_state()


def _culprit(model: torch.nn.Module, stream: NamedStream) -> str | None:
    """The name of the tensor that the current layer cannot take: its buffered tensors are loaded again, one by one."""
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
                names = [known for value in call.arguments.values() if (known := stream.name_of(value))]
                return names[0] if names else f"{path}.{name}"
    return None


def _put_back(model: torch.nn.Module) -> None:
    """Give every layer that is still being reloaded its old tensors. Their content may be a mix of old and new."""
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(layer, info)
        info.reset()
