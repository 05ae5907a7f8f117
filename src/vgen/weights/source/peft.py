"""PEFT: adapters merged into copies of the layers that they adapt. The trainer's own tensors are never written.

If adapters were merged in place and unmerged after each sync, bf16 weights would drift. So a layer's modules are
rebuilt around copies of its tensors, and PEFT's own `merge` runs on those. It computes in its own dtypes, so the
result equals `merge_and_unload` of a copied model bit by bit, for every kind of adapter. If the base is quantized, the
adapter is added to the dequantized weight, which is what the trainer's forward pass computes.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...errors import WeightSyncError
from .gather_error import gather_error
from .unwrap_model import checkpoint_entries, clean, unwrapped_once

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def adapted_layers(root: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The outermost modules that PEFT has put into `root`, by their clean path. Empty if PEFT is not in use."""
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or other is None:
        return {}
    layers: dict[str, torch.nn.Module] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        inside = any(path.startswith(f"{outer}.") for outer in layers)
        if not inside and isinstance(module, tuners.BaseTunerLayer | other.AuxiliaryTrainingWrapper):
            layers[path] = module
    return {clean(path): module for path, module in layers.items()}


def refuse_unmergeable(model: Any) -> None:
    """Raise `WeightSyncError` if an adapter changes more than weights, or PEFT says that it cannot be merged."""
    while (inner := unwrapped_once(model)) is not None:
        if "PeftModel" in {kind.__name__ for kind in type(model).__mro__}:
            config = model.active_peft_config
            if config.is_prompt_learning or not hasattr(model.base_model, "merge_and_unload"):
                raise gather_error(f"adapters of type {config.peft_type} cannot be merged into weights")
            try:
                model.base_model._check_merge_allowed()
            except Exception as error:
                raise gather_error(str(error)) from error
        model = inner


def state_of(layers: Mapping[str, torch.nn.Module]) -> tuple[Any, ...]:
    """What decides, apart from the tensors, how the layers are merged."""
    names = ("active_adapters", "merged_adapters", "disable_adapters")
    return tuple(
        (path, id(module), *(repr(getattr(part, name, None)) for part in module.modules() for name in names))
        for path, module in layers.items()
    )


@torch.no_grad()
def merged(path: str, layer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the plain module that remains when the layer's active adapters are merged, by name.

    `tensors` are copied first. Their names are relative to `layer`; the names returned are relative to the module that
    takes its place.
    """
    replica = _replica(layer, {name: tensor.clone() for name, tensor in tensors.items()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example that the adapter was merged already
            plain = _unloaded(replica)
    except WeightSyncError:
        raise
    except Exception as error:
        raise gather_error(f"PEFT could not merge it: {type(error).__name__}: {error}", path) from error
    return dict(_named_tensors(plain))


def _unloaded(layer: Any) -> torch.nn.Module:
    """What `merge_and_unload` does with one layer. Disabled adapters are left out, as in a forward pass."""
    disabled = layer.disable_adapters
    if hasattr(layer, "unload_and_optionally_merge_module"):
        if disabled and hasattr(layer, "modules_to_save"):
            return layer.original_module
        return layer.unload_and_optionally_merge_module(merge=not disabled, safe_merge=False, adapter_names=None)
    if not disabled and (quantized := _bitsandbytes_parent(layer)):
        return _added(layer, quantized)
    if not disabled:
        layer.merge(safe_merge=False, adapter_names=None)
    return layer.get_base_layer()


def _bitsandbytes_parent(layer: Any) -> str | None:
    kinds = {kind.__name__ for kind in type(layer.get_base_layer()).__mro__}
    return next(iter(kinds & {"Linear4bit", "Linear8bitLt"}), None)


def _added(layer: Any, kind: str) -> torch.nn.Module:
    """Adds the adapters to the base, which is dequantized by now. PEFT's `merge` would quantize the sum again."""
    base = layer.get_base_layer()
    for adapter in layer.active_adapters:
        if adapter in getattr(layer, "lora_A", ()):
            if adapter in layer.lora_variant or layer.lora_bias[adapter]:
                raise gather_error(f"this kind of LoRA cannot be merged into a {kind}")
            delta = layer.get_delta_weight(adapter)
            base.weight.data = (base.weight.data.to(delta.dtype) + delta).to(base.weight.dtype)
        elif any(adapter in getattr(layer, name) for name in layer.adapter_layer_names):
            raise gather_error(f"{type(layer).__name__} cannot be merged into a {kind}")
    return base


def _replica(module: Any, tensors: dict[str, torch.Tensor], prefix: str = "") -> Any:
    """The same modules without wrappers and hooks, around `tensors`. Containers that a merge changes are copied."""
    while (inner := unwrapped_once(module)) is not None:
        module = inner
    copy = object.__new__(_plain_class(module))
    attributes = {
        name: type(value)(value) if type(value) in (list, dict, set) else value
        for name, value in module.__dict__.items()
        if name not in ("_parameters", "_modules")
    }
    copy.__dict__.update(attributes | {name: OrderedDict() for name in _HOOKS})
    copy.__dict__.update(_parameters={}, _buffers=dict(module._buffers), _modules={})
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else _replica(child, tensors, f"{prefix}{name}.")
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(prefix)
        if full_name.startswith(prefix) and "." not in name:
            copy.__dict__.pop(name, None)  # FSDP1 keeps plain views under the names of parameters
            if name in module._buffers:
                copy._buffers[name] = tensor
            else:
                copy._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
    for name, parameter in module._parameters.items():
        if parameter is None:
            copy._parameters[name] = None  # a layer without bias
    return copy


def _plain_class(module: Any) -> type:
    """The module's class without FSDP2, which derives a class for what it shards: `FSDPLinear(FSDPModule, Linear)`."""
    kind = type(module)
    return kind.__bases__[1] if [base.__name__ for base in kind.__bases__[:1]] == ["FSDPModule"] else kind


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in checkpoint_entries(part):
            yield (f"{path}.{name}" if path else name), tensor.detach()
