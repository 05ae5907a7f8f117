"""Generation with vLLM servers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..arguments import checked_call, texts
from ..distributed.placement import Placement
from ..engine_protocol import Transport
from ..errors import ArgumentError
from ..profiling import ProfilingContext, semconv
from ..weights.source.module_source import ModuleSource, source_of
from ..weights.source.unwrap_model import unwrapped
from .generation import Generation
from .options import RequestTracing, ServerConnection, WeightSyncOptions, profiling_context
from .stalls import STALL_SECONDS
from .weight_sync import version_name

if TYPE_CHECKING:
    import torch


class ServerGeneration(Generation):
    """Generates with one or more vLLM servers that hold the trainer's model.

        with ServerGeneration(model, base_urls=["http://a:8000", "http://b:8000"], profiling=profiling) as generation:
            rollouts = generation.generate(prompts, Sampling(max_tokens=512), num_generations=8)
            generation.sync_weights(version="step-1")

    The first generation syncs the trainer's weights, whatever the servers hold. Each completion ends at each
    end-of-sequence token of the model's `generation_config`.

    With None in place of the model the engine is frozen: a teacher, judge or reference. It generates and scores with
    the weights that the servers have, takes no lease, and changes no server. `sync_weights`, `sleep` and `pause` raise
    `EngineStateError`; `generate` raises `EngineError` when another trainer has synced weights into a server.

    Faster servers get more requests. When a server is lost, the others take over its unanswered requests. `close`
    releases the servers and closes the connections; the servers keep running.

    Under accelerate or torch.distributed all ranks construct this object and make the same calls. Only rank 0 talks to
    the servers: it sends the prompts of all ranks, and each rank receives its own completions. If any rank fails, all
    ranks raise.

    Args:
        model: The trainer's model, which vgen reads at every sync and never writes to. Or a `ModuleSource` (from
            `vgen.weights.source_of`) that leaves weights out or renames them. None for a frozen engine.
        accelerator: An `accelerate.Accelerator`, which knows the ranks. By default vgen asks torch.distributed.
        base_urls: The address of each server, as `http://host:port`. One address may be a router in front of many.
        api_key: The key of the servers' inference routes; or its file as a `pathlib.Path`, which is read again when a
            server refuses the key.
        control_key: The key of all other routes of servers that `vgen serve` started, or its file.
        connection: Timeouts, TLS, ports and the takeover of servers.
        weight_transport: How weights get to the servers: `resident` (server on the trainer's own GPU), `nccl` (server
            on another GPU), `shared_memory` (server on the trainer's host), `gloo` (server elsewhere) or `checkpoint`
            (server that `vgen serve` did not start). By default the first of these that a server supports. `nccl` also
            works with stock servers that were started with vLLM's own engine of that name, and so does `ipc`, which
            vgen never chooses by itself.
        weight_sync: What a sync does with running requests, and the memory or folder that it uses.
        stall_seconds: As for `Generation`. A server reports its token count every 5 seconds, a stock server never does.
        processing_class, structured_outputs_regex, request_tracing, show_progress, drift_every, weight_version,
            profiling: As for `Generation`.

    Raises:
        ServerError: A server cannot be reached, or rejects the keys.
        EngineError: An address is no vLLM server, the server holds another model, it moves experts while it runs
            (`enable_eplb`), or it keeps keys and values where a weight sync cannot have them discarded (some connectors
            of `kv_transfer_config`).
        RankError: Another rank did not construct the object in time.
    """

    @checked_call
    def __init__(
        self,
        model: torch.nn.Module | ModuleSource | None,
        *,
        accelerator: Any = None,
        base_urls: str | Sequence[str] = "http://127.0.0.1:8000",
        api_key: str | os.PathLike[str] | None = None,
        control_key: str | os.PathLike[str] | None = None,
        connection: ServerConnection = ServerConnection(),
        processing_class: Any = None,
        weight_transport: Transport | None = None,
        weight_sync: WeightSyncOptions = WeightSyncOptions(),
        structured_outputs_regex: str | None = None,
        request_tracing: RequestTracing = RequestTracing(),
        stall_seconds: float | None = STALL_SECONDS,
        show_progress: bool = False,
        drift_every: int | None = None,
        weight_version: str | int = "0",
        profiling: ProfilingContext = ProfilingContext.disabled(),
    ) -> None:
        from ..distributed.leader_ranks import LeaderRanks
        from ..engines.client.engine import ServerEngine
        from ..engines.client.http import HttpClient
        from ..engines.leader_engine import LeaderEngine

        profiling, weight_version = profiling_context(profiling), version_name(weight_version)
        urls = tuple(base_address(url) for url in texts("base_urls", base_urls))
        if not urls:
            raise ArgumentError("base_urls", "must hold the address of a server: base_urls=['http://host:port']")
        source = None if model is None else source_of(model)

        def connect() -> ServerEngine:
            servers = [
                HttpClient(
                    url,
                    api_key=api_key,
                    control_key=control_key,
                    ssl=connection.ssl,
                    timeout=connection.timeout,
                    connect_timeout=connection.connect_timeout,
                )
                for url in urls
            ]
            module = None if source is None else unwrapped(source.model)
            config = _text_config(module)
            return ServerEngine(
                servers,
                shape=_shape(module, config),
                vocabulary_size=getattr(config, "vocab_size", None),
                request_timing=connection.request_timing,
                pause_mode=weight_sync.pause_mode,
                weight_transport=weight_transport,
                weights_folder=weight_sync.weights_folder,
                bucket_bytes=weight_sync.bucket_bytes,
                weights_port=connection.group_port and connection.group_port + 1,
                timeout=connection.timeout,
                takeover=connection.takeover,
                frozen=source is None,
            )

        placement = Placement.of(accelerator)
        ranks = placement.leader_ranks(
            timeout=connection.timeout, group_port=connection.group_port, profiling=profiling
        )
        profiling = profiling.bind({semconv.RANK: ranks.index})
        with profiling.span(semconv.ENGINE_INIT, {semconv.ENGINE: ServerEngine.kind}) as span:
            engine = LeaderEngine(ranks, connect) if isinstance(ranks, LeaderRanks) else connect()
            span.set({semconv.DEVICE: engine.device_type, semconv.MODEL: engine.model})
        super().__init__(
            engine,
            source,
            processing_class=processing_class,
            stale=source is not None,
            ranks=ranks,
            structured_outputs_regex=structured_outputs_regex,
            request_tracing=request_tracing,
            stall_seconds=stall_seconds,
            show_progress=show_progress,
            drift_every=drift_every,
            weight_version=weight_version,
            profiling=profiling,
        )


def _text_config(model: Any) -> Any:
    """The configuration of the language model; None if the model has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _shape(model: Any, config: Any) -> dict[str, int]:
    """The sizes by which a server tells the trainer's model from another one."""
    from ..engines.server_api import SHAPE

    sizes: dict[str, Any] = {name: getattr(config, name, None) for name in SHAPE}
    with suppress(AttributeError, NotImplementedError):
        # The attribute of the module, because on a rank with a shard the weight's own shape is smaller.
        sizes["embedding_dim"] = model.get_input_embeddings().embedding_dim
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def base_address(url: str) -> str:
    """The address of a server, without the `/v1` at its end that OpenAI's clients want.

    Raises `ArgumentError` for what is no http(s) address, such as an IPv6 address without brackets.
    """
    rule = "must be an address such as http://host:8000 or http://[::1]:8000"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:  # a port that is no number, or an IPv6 address without brackets
        valid = False
    if not valid:
        raise ArgumentError("base_urls", f"{rule}, got {url.rpartition('@')[2]!r}")
    return url.rstrip("/").removesuffix("/v1")
