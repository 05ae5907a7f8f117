"""vgen: the generation layer of an RL post-training loop, with its telemetry built in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .engine_protocol import EngineState
    from .errors import (
        ArgumentError,
        EngineError,
        EngineStateError,
        MissingExtraError,
        PromptError,
        RankError,
        ServerError,
        VgenError,
        WeightSyncError,
    )
    from .generation import (
        ColocateGeneration,
        Generation,
        RequestTracing,
        ServerConnection,
        ServerGeneration,
        WeightSyncOptions,
    )
    from .padding import PaddedBatch
    from .profiling import Instrument, ProfilingContext, Sink, Span, Step
    from .types import (
        Completion,
        Completions,
        EngineVerification,
        LoRARequest,
        RequestTiming,
        Sampling,
        SleepReport,
        SyncReport,
        WeightVerification,
    )

_HOMES = {
    "ArgumentError": "errors",
    "ColocateGeneration": "generation",
    "Completion": "types",
    "Completions": "types",
    "EngineError": "errors",
    "EngineState": "engine_protocol",
    "EngineVerification": "types",
    "EngineStateError": "errors",
    "Generation": "generation",
    "Instrument": "profiling",
    "LoRARequest": "types",
    "MissingExtraError": "errors",
    "PaddedBatch": "padding",
    "ProfilingContext": "profiling",
    "PromptError": "errors",
    "RankError": "errors",
    "RequestTiming": "types",
    "RequestTracing": "generation",
    "Sampling": "types",
    "ServerConnection": "generation",
    "ServerError": "errors",
    "ServerGeneration": "generation",
    "Sink": "profiling",
    "SleepReport": "types",
    "Span": "profiling",
    "Step": "profiling",
    "SyncReport": "types",
    "VgenError": "errors",
    "WeightSyncError": "errors",
    "WeightSyncOptions": "generation",
    "WeightVerification": "types",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vgen' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
