"""Generation with vLLM servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..engines.base import BUCKET_BYTES, PauseMode, Transport
from ..profiling import ProfilingContext, names
from ..ranks import DistributedRanks, LedEngine, ranks_of
from ..weights.names import unwrapped
from ..weights.source import ModuleSource, source_of
from .base import Generation
from .stall import STALL_SECONDS

if TYPE_CHECKING:
    import torch


class ServerGeneration(Generation):
    """Generates with one or more vLLM servers that hold the trainer's model.

        with ServerGeneration(model, base_urls=["http://a:8000", "http://b:8000"], profiling=profiling) as generation:
            rollouts = generation.generate(prompts, Sampling(max_tokens=512), num_generations=8)
            generation.sync_weights(version="step-1")

    Requests are spread over the servers by how fast they answer; what a lost server has not answered goes
    to the others. Closing ends the connections; the servers go on.

    Under accelerate or torch.distributed all ranks construct it and make the same calls. Rank 0 alone talks to the
    servers: it is given all ranks' prompts, each rank's own completions come back, and what fails on one rank raises
    on all.

    Args:
        model: The trainer's model. It is read at every sync and never written. Or a source of it, by `source_of`, which
            leaves weights out or renames them.
        accelerator: An `accelerate.Accelerator`, for the ranks; else torch.distributed is asked, where initialized.
        base_urls: Where the servers are; one may be a router in front of many. `host` and `port` name a single one.
        processing_class: The tokenizer or processor, for prompts given as text; `tokenizer` is the same.
        timeout: Seconds in which every call must be answered, a whole generation among them, and in which all ranks
            must come to a call.
        connect_timeout: Seconds in which a server must accept a connection.
        ssl: An `ssl.SSLContext` for `https` addresses whose certificates the system does not know.
        group_port: Where rank 0 listens for the others; any free port by default. On one machine it is only there.
            Servers that take weights by `nccl` or `gloo` meet it on the next port.
        api_key: What guards the servers' inference routes.
        control_key: What guards all others, where `vgen serve` started them.
        pause_mode: What becomes of requests in flight during a sync: `keep`, `wait` or `abort`.
        weight_transport: `resident` (a server on the trainer's own GPU), `shared_memory` (on its host), `nccl` (on
            another GPU), `gloo` (elsewhere) or `checkpoint` (one that `vgen serve` has not started); by default the
            first of these that each server can take. `nccl` also serves stock servers that were started with vLLM's
            own engine of that name; so does `ipc`, where it is asked for.
        weights_folder: A folder that servers see too, for syncs by checkpoint. The system's temporary one by default.
        bucket_bytes: Of memory in which weights travel; two such buckets are held, and a larger tensor gets what it
            needs.
        takeover: Whether servers are taken from a trainer that is alive. One that is gone is waited for, a minute at
            most.
        request_timing: Whether a stock server is asked for each completion's timing, which takes a call for each;
            one that `vgen serve` started always says.
        structured_outputs_regex: What completions must match, where a `Sampling` says nothing itself.
        request_spans: How many requests of a call, the slowest ones, become spans; all are in the metrics.
        traced_requests: How many requests of a call, random ones, are traced from their dispatch, the engine's own
            span beneath theirs; or a function of the step's number, for chosen steps.
        stall_seconds: After how long without a token, a completion or a phase a call counts as stalled, which is
            logged and shown while it lasts; None for never. Servers tell of single tokens every 5 seconds, stock ones
            never.
        show_progress: Whether long calls show a progress bar on a terminal.
        weight_version: What the weights are called until the first sync: a resumed run's own last version.
        profiling: Where spans and measurements go.

    Raises:
        ServerError: A server cannot be reached, or refuses the keys.
        EngineError: It is no vLLM server, or holds another model.
        RankError: Another rank did not come.
    """

    def __init__(
        self,
        model: torch.nn.Module | ModuleSource,
        *,
        accelerator: Any = None,
        base_urls: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 8000,
        processing_class: Any = None,
        tokenizer: Any = None,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        ssl: Any = None,
        group_port: int = 0,
        api_key: str | None = None,
        control_key: str | None = None,
        pause_mode: PauseMode = "keep",
        weight_transport: Transport | None = None,
        weights_folder: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        takeover: bool = False,
        request_timing: bool = True,
        structured_outputs_regex: str | None = None,
        request_spans: int = 8,
        traced_requests: int | Callable[[int | None], int] = 2,
        stall_seconds: float | None = STALL_SECONDS,
        show_progress: bool = False,
        weight_version: str = "0",
        profiling: ProfilingContext = ProfilingContext.disabled(),
    ) -> None:
        from ..engines.control import SHAPE
        from ..engines.http import Server
        from ..engines.peer import STOCK_VERSION
        from ..engines.server import ServerEngine

        source = source_of(model)

        def connect() -> ServerEngine:
            urls = [base_urls] if isinstance(base_urls, str) else list(base_urls) or [f"http://{host}:{port}"]
            keys: dict[str, Any] = dict(api_key=api_key, control_key=control_key, ssl=ssl)
            servers = [Server(url, timeout=timeout, connect_timeout=connect_timeout, **keys) for url in urls]
            trainers = unwrapped(source.model)
            text = trainers.config.get_text_config()
            shape = {name: found for name in SHAPE if isinstance(found := getattr(text, name, None), int)}
            if isinstance(width := _embedding_width(trainers), int):
                shape["embedding_dim"] = width
            return ServerEngine(
                servers,
                shape=shape,
                vocabulary_size=getattr(text, "vocab_size", None),
                request_timing=request_timing,
                pause_mode=pause_mode,
                weight_transport=weight_transport,
                weights_folder=weights_folder,
                bucket_bytes=bucket_bytes,
                weights_port=group_port and group_port + 1,
                timeout=timeout,
                takeover=takeover,
            )

        ranks = ranks_of(accelerator, timeout=timeout, group_port=group_port, profiling=profiling)
        profiling = profiling.bind({names.RANK: ranks.index})
        with profiling.span(names.ENGINE_INIT, {names.ENGINE: ServerEngine.kind}) as span:
            engine = LedEngine(ranks, connect) if isinstance(ranks, DistributedRanks) else connect()
            span.set({names.DEVICE: engine.device_type, names.MODEL: engine.model})
            held = engine.weight_version
        super().__init__(
            engine,
            source,
            tokenizer=processing_class or tokenizer,
            # Another trainer has been here, or this one goes on elsewhere: its weights are not the trainer's.
            stale=held not in (None, weight_version) and (held, weight_version) != (STOCK_VERSION, "0"),
            ranks=ranks,
            structured_outputs_regex=structured_outputs_regex,
            request_spans=request_spans,
            traced_requests=traced_requests,
            stall_seconds=stall_seconds,
            show_progress=show_progress,
            weight_version=weight_version,
            profiling=profiling,
        )


def _embedding_width(model: Any) -> int | None:
    """As the module says: on a rank that holds a shard, its weight's own shape is another."""
    try:
        return model.get_input_embeddings().embedding_dim
    except (AttributeError, NotImplementedError):
        return None
