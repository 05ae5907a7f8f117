"""Option objects of the generation classes: what most users leave at its default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

from ..engine_protocol import BUCKET_BYTES, PauseMode
from ..errors import ArgumentError
from ..profiling import ProfilingContext


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTracing:
    """Which requests of a call become spans. The metrics count every request, whatever is set here.

    ServerGeneration(model, request_tracing=RequestTracing(request_spans=20, traced_requests=0))
    """

    request_spans: int = 8
    """How many of a call's requests become spans after the call, the slowest first. Requests that the engine aborted
    become spans too."""
    traced_requests: int | Callable[[int | None], int] = 2
    """How many requests of a call, chosen at random, are traced from the moment they are sent. The engine's own spans
    are children of these. A function gets the step's number (None outside a step) and returns how many."""


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments that a generation class takes for `Generation`, which explains them."""

    structured_outputs_regex: str | None
    request_tracing: RequestTracing
    stall_seconds: float | None
    show_progress: bool
    drift_every: int | None


def profiling_context(profiling: Any) -> ProfilingContext:
    """The caller's context; the disabled one for None. Raises `ArgumentError` for anything else."""
    if profiling is None:
        return ProfilingContext.disabled()
    if not isinstance(profiling, ProfilingContext):
        kind = type(profiling).__name__
        raise ArgumentError("profiling", f"must be a ProfilingContext, got a {kind}: pass ProfilingContext([sink])")
    return profiling


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConnection:
    """How `ServerGeneration` connects to its servers, and the trainer's ranks to each other.

    ServerGeneration(model, base_urls=urls, connection=ServerConnection(timeout=60, takeover=True))
    """

    timeout: float = 600.0
    """Seconds within which a server must answer each call, a whole generation included, and within which all ranks
    must join a call."""
    connect_timeout: float = 10.0
    """Seconds within which a server must accept a connection."""
    ssl: Any = None
    """An `ssl.SSLContext` for `https` servers whose certificates the system does not know."""
    group_port: int = 0
    """The port on which rank 0 listens for the other ranks; 0 takes any free one. On one machine rank 0 listens on
    the loopback interface only. Servers that receive weights by `nccl` or `gloo` connect to the next port."""
    takeover: bool = False
    """Whether to take servers away from a trainer that is still alive. The lease of a trainer that is gone expires by
    itself within a minute, and the constructor waits for that."""
    request_timing: bool = True
    """Whether to ask a stock `vllm serve` for the timing of each completion, which costs one HTTP call for each.
    A server that `vgen serve` started always sends the timing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSyncOptions:
    """How a weight sync treats servers.

    ServerGeneration(model, base_urls=urls, weight_sync=WeightSyncOptions(pause_mode="wait"))
    """

    pause_mode: PauseMode = "keep"
    """What happens to requests that are running when a sync begins: `keep` freezes them and continues them with the
    new weights, `wait` waits until they are done, `abort` ends them as they are: they come back with the tokens so far
    and the finish reason `abort`."""
    weights_folder: str | None = None
    """A folder that trainer and servers share, for `weight_transport="checkpoint"`. By default a temporary folder."""
    bucket_bytes: int = BUCKET_BYTES
    """Size of a buffer in which weights travel, in bytes. There are two; a tensor that is larger gets a larger one."""
