"""Models inside their wrappers, and parameter names without what wrappers add to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_INNER_ATTRIBUTE = {
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
}


def clean(name: str) -> str:
    """`name` without what `torch.compile`, activation checkpointing and FSDP insert into it."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def unwrapped_once(model: Any) -> Any:
    """The model inside the outermost wrapper; None if there is no wrapper. Wrappers are known by their class names."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if attribute := next((attribute for kind, attribute in _INNER_ATTRIBUTE.items() if kind in kinds), None):
        return getattr(model, attribute)
    if "PeftModel" in kinds:
        return model.get_base_model()
    return model.model if "BaseTuner" in kinds else None


def unwrapped(model: Any) -> Any:
    """The model inside all wrappers: compile, checkpointing, DDP, FSDP1, DeepSpeed and PEFT.

    PEFT's layers, and wrappers of single layers, are still in it.
    """
    while (inner := unwrapped_once(model)) is not None:
        model = inner
    return model


def checkpoint_entries(module: Any) -> Iterator[tuple[str, Any]]:
    """Name and tensor of the parameters and the persistent buffers of this module, without its children."""
    persistent = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    yield from ((name, tensor) for name, tensor in {**module._parameters, **persistent}.items() if tensor is not None)


def path_of(module: Any, top: Any) -> str:
    """The path of `module` in `top`, wrappers included, with a dot at its end; empty for `top` itself."""
    path = next(path for path, candidate in top.named_modules() if candidate is module)
    return f"{path}." if path else ""
