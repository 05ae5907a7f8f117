"""The ordered list of transports, and the choice of one for each server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...engine_protocol import Source, Transport
from ...errors import WeightSyncError
from .checkpoint import CheckpointTransport
from .collective import CollectiveTransport
from .cuda_ipc import CudaIpcTransport
from .shared_memory import SharedMemoryTransport
from .vllm_engines import VllmTransport
from .weight_transport import (
    EndpointGroup,
    TransportEndpoint,
    TransportSettings,
    TransportUnavailable,
    WeightTransport,
)

E = TypeVar("E", bound=TransportEndpoint)


def transports_of(settings: TransportSettings) -> list[WeightTransport]:
    """All transports, the preferred ones first. The last one supports every server."""
    return [
        CudaIpcTransport(),
        CollectiveTransport(settings, "nccl"),
        SharedMemoryTransport(settings),
        CollectiveTransport(settings, "gloo"),
        VllmTransport(settings, "nccl"),
        VllmTransport(settings, "ipc"),
        CheckpointTransport(settings),
    ]


def refusal(endpoint: TransportEndpoint, name: Transport | None) -> str:
    """Why this server cannot take weights by the transport that the user asked for, and what to do; empty if it can."""
    return _reasons(_candidates(transports_of(TransportSettings()), name), endpoint, None)


@dataclass(frozen=True, slots=True)
class Choice(Generic[E]):
    """Open transports, and the servers that each of them serves."""

    served: dict[WeightTransport, list[E]]
    """In the order of preference, in which the transports send, so that servers that reload by themselves are last."""
    names: str
    """The transports' names in the order of the servers, with `+` between them."""
    reasons: str
    """Why each one was chosen, and why a preferred one could not be opened."""


def choose(
    transports: Sequence[WeightTransport],
    endpoints: Sequence[E],
    source: Source,
    name: Transport | None,
    group_of: Callable[[Sequence[E]], EndpointGroup],
) -> Choice[E]:
    """Open, for each server, the first transport that supports it, or the one called `name`.

    Raises `WeightSyncError` if the transport called `name` cannot serve one of them.
    """
    candidates = _candidates(transports, name)
    served, unavailable, remaining = dict[WeightTransport, list[E]](), list[str](), list(endpoints)
    for transport in candidates:
        if supported := [each for each in remaining if transport.supports(each, source) is None]:
            try:
                transport.open(group_of(supported), source)
            except TransportUnavailable as error:
                if name:
                    raise WeightSyncError(str(error), phase="gather", receiver="trainer") from error
                unavailable.append(f"not {transport.name}: {error}")
            else:
                served[transport] = supported
                remaining = [each for each in remaining if each not in supported]
    if remaining:
        receivers = ", ".join(each.name for each in remaining)
        fitting = [each for each in candidates if each.supports(remaining[0], None) is None]
        raise WeightSyncError(_reasons(fitting, remaining[0], source), phase="transfer", receiver=receivers)
    used = list(dict.fromkeys(transport for each in endpoints for transport in served if each in served[transport]))
    names = "+".join(dict.fromkeys(transport.name for transport in used))
    return Choice(served, names, "asked for" if name else "; ".join([*(each.serves for each in used), *unavailable]))


def _candidates(transports: Sequence[WeightTransport], name: Transport | None) -> list[WeightTransport]:
    return [each for each in transports if (each.name == name if name else not each.on_request)]


def _reasons(transports: Sequence[WeightTransport], endpoint: TransportEndpoint, source: Source | None) -> str:
    """Why none of the transports supports this server; empty if one does."""
    reasons = [transport.supports(endpoint, source) for transport in transports]
    return "" if None in reasons else ", or ".join(dict.fromkeys(filter(None, reasons)))
