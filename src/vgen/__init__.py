"""vgen: the generation layer of an RL post-training loop, with its telemetry built in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        EngineError,
        EngineStateError,
        MissingExtraError,
        PromptError,
        RankError,
        ServerError,
        VgenError,
        WeightSyncError,
    )
    from .generation import ColocateGeneration, ServerGeneration
    from .profiling import Instrument, ProfilingContext, Sink
    from .types import Completion, Completions, LoRARequest, RequestTiming, Sampling

__version__ = "0.1.0"

_HOMES = {
    "Completion": "types",
    "Completions": "types",
    "ColocateGeneration": "generation",
    "EngineError": "errors",
    "EngineStateError": "errors",
    "Instrument": "profiling",
    "LoRARequest": "types",
    "MissingExtraError": "errors",
    "ProfilingContext": "profiling",
    "PromptError": "errors",
    "RankError": "errors",
    "RequestTiming": "types",
    "Sampling": "types",
    "ServerError": "errors",
    "ServerGeneration": "generation",
    "Sink": "profiling",
    "VgenError": "errors",
    "WeightSyncError": "errors",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vgen' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
