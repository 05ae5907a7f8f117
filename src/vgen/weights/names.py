"""Parameter names: from what wrappers make of them to what the model itself calls them."""

from __future__ import annotations

from typing import Any

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_AROUND = {
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
}


def clean(name: str) -> str:
    """`name` without what `torch.compile`, activation checkpointing and FSDP put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unwrapped_once(model: Any) -> Any:
    """The model inside of the outermost wrapper, None if it has none."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if inner := next((attribute for kind, attribute in _AROUND.items() if kind in kinds), None):
        return getattr(model, inner)
    if "PeftModel" in kinds:
        return model.get_base_model()
    return model.model if "BaseTuner" in kinds else None


def unwrapped(model: Any) -> Any:
    """The model inside of all wrappers: compile, checkpointing, DDP, FSDP1, DeepSpeed and PEFT.

    PEFT's layers are in it still, and so is what was wrapped further down, layer by layer.
    """
    while (inner := unwrapped_once(model)) is not None:
        model = inner
    return model


def path_of(module: Any, top: Any) -> str:
    """Where `module` is in `top`, with a dot at its end, wrappers included; empty for `top` itself."""
    path = next(path for path, found in top.named_modules() if found is module)
    return f"{path}." if path else ""
