"""Parameter names: from what wrappers make of them to what a checkpoint holds."""

from __future__ import annotations

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def checkpoint_name(name: str) -> str:
    """`name` without what `torch.compile`, activation checkpointing, FSDP and DDP put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
