"""Weights: from the trainer's model to the engine, and whether they arrived.

Users need `source_of`, which leaves tensors out or renames them, and `adapter_of`, which exports a LoRA adapter. The
names are loaded when they are first used: nothing here imports torch before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine_protocol import Source
    from .source.adapter_export import Adapter, adapter_of
    from .source.module_source import ModuleSource, source_of

_HOMES = {
    "Adapter": ".source.adapter_export",
    "ModuleSource": ".source.module_source",
    "Source": "..engine_protocol",
    "adapter_of": ".source.adapter_export",
    "source_of": ".source.module_source",
}
__all__ = ["Adapter", "ModuleSource", "Source", "adapter_of", "source_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vgen.weights' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
