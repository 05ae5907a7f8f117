"""New weights for one or more servers: pause, transfer, load, reset the caches, set the version, resume."""

from __future__ import annotations

import asyncio
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..errors import ServerError, WeightSyncError
from ..profiling import Span, names
from ..weights.checkpoint import write_checkpoint
from ..weights.probe import obstacle
from ..weights.shared_memory import SharedMemoryTransfer, as_sync_error
from ..weights.source import model_of
from ..weights.spoil import RandomWeights, metadata_of
from .base import PauseMode, Source, SyncTrace, Transport
from .http import Loop
from .peer import STOCK_VERSION, Peer, held_version

logger = logging.getLogger("vgen.engines.server")

_REASONS = {
    "shared_memory": "servers with vgen's plugin on this host",
    "checkpoint": "servers without vgen's plugin reload from a folder",
    "shared_memory+checkpoint": "some servers have vgen's plugin, some have not",
}
_CACHES = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")


class Updater:
    """Sends weights to `peers`, to all of them together. Nothing here is ever sent twice."""

    def __init__(
        self,
        peers: Sequence[Peer],
        loop: Loop,
        *,
        transport: Transport | None,
        folder: str | None,
        bucket_bytes: int,
        timeout: float,
    ) -> None:
        self._transport = transport
        self._peers, self._loop, self._folder, self._bucket_bytes = peers, loop, folder, bucket_bytes
        self._timeout = timeout
        self._transfer: SharedMemoryTransfer | None = None
        self._known: tuple[str, ...] = ()
        """Whom the transfer's memory is shared with."""

    def sync(
        self, source: Source, version: str, trace: SyncTrace, *, mode: PauseMode, resume: bool, spoil: bool
    ) -> list[Peer]:
        """Replace the weights of every server that can be reached; returns these. Raises `WeightSyncError`.

        With `spoil`, where one of them was never verified, random weights go before: see `weights.spoil`.
        """
        peers = self._reachable(trace)
        random = _random_like(source, peers) if spoil and not all(peer.verified for peer in peers) else None
        shared = [peer for peer in peers if self._transport != "checkpoint" and "shared_memory" in peer.features]
        stock = [peer for peer in peers if peer not in shared]
        kinds = [kind for kind, those in (("shared_memory", shared), ("checkpoint", stock)) if those]
        transport = "+".join(kinds)
        trace.set(
            {
                names.TRANSPORT: transport,
                names.TRANSPORT_REASON: "asked for" if self._transport else _REASONS[transport],
                names.SYNC_RECEIVERS: len(peers),
            }
        )
        with ExitStack() as folders:
            written = list[str]()
            if stock:  # before the pause: the servers generate while it is written
                sources = [source] if random is None else [random, source]
                with trace.phase("transfer") as span:
                    written = [folders.enter_context(self._written(weights)) for weights in sources]
                    span.set({names.GATHER_SECONDS: source.seconds})
            paused_at = time.monotonic()
            with trace.phase("pause"):
                self._all(peers, "pause", lambda peer: peer.server.post(f"/pause?mode={mode}"))
            if shared:
                self._share(shared, random, source, version, trace)
            if stock:
                self._reload(stock, written, version, trace)
        with trace.phase("reset_cache"):
            for path in _CACHES:
                self._all(peers, "reset_cache", lambda peer, path=path: _reset(peer, path))
        if resume:
            with trace.phase("resume"):
                self._all(peers, "resume", lambda peer: peer.server.post("/resume"))
        trace.set({names.PAUSED_SECONDS: time.monotonic() - paused_at})
        for peer in peers:
            peer.lost, peer.weight_version = False, version
        return peers

    def close(self) -> None:
        """Give the shared memory back."""
        if self._transfer is not None:
            self._transfer.close()

    def _reachable(self, trace: SyncTrace) -> list[Peer]:
        """All servers, but for those that were lost before and still are; and who else has changed their weights."""

        async def version(peer: Peer) -> str | ServerError | None:
            try:
                held = await held_version(peer.server)
                if peer.lost or held == STOCK_VERSION != peer.weight_version:
                    await peer.rejoin(self._timeout)  # it has been started anew
                return held
            except ServerError as error:
                return error

        async def ask() -> list[str | ServerError | None]:
            return await asyncio.gather(*(version(peer) for peer in self._peers))

        reachable: list[Peer] = []
        for peer, found in zip(self._peers, self._loop.run(ask()), strict=True):
            if isinstance(found, ServerError):
                if not peer.lost:
                    raise WeightSyncError(str(found), phase="pause", receiver=peer.name) from found
                logger.warning("vgen: %s is still out of reach, and left out of this weight sync", peer.name)
                continue
            if not peer.lost and found != peer.weight_version:
                trace.set({names.FOREIGN_VERSION: found})
                message = "vgen: %s holds weights %r, which another trainer has sent: %r was expected"
                logger.warning(message, peer.name, found, peer.weight_version)
            reachable.append(peer)
        if not reachable:
            who = ", ".join(peer.name for peer in self._peers)
            raise WeightSyncError("no server can be reached", phase="pause", receiver=who)
        return reachable

    def _share(
        self, peers: Sequence[Peer], random: RandomWeights | None, source: Source, version: str, trace: SyncTrace
    ) -> None:
        fleet = _Fleet(self._loop, peers)
        known = tuple(peer.name for peer in peers)
        if self._transfer is None or known != self._known:
            self.close()
            self._transfer, self._known = SharedMemoryTransfer(fleet, bucket_bytes=self._bucket_bytes), known
        transfer = self._transfer
        transfer.client = fleet
        with trace.phase("transfer") as span:
            if random is not None:
                transfer.send(random, version)
            transfer.stream(source)
            span.set(
                {
                    names.GATHER_SECONDS: source.seconds,
                    names.COPY_SECONDS: transfer.copy_seconds,
                    names.BUCKETS: transfer.buckets_sent,
                }
            )
            fleet.tell(span, "update_weights")
        with trace.phase("load") as span:
            transfer.finish(version)
            fleet.tell(span, "finish_weight_update")

    @contextmanager
    def _written(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="vgen-weights-", dir=self._folder) as folder:
            write_checkpoint(weights, folder)
            yield folder

    def _reload(self, peers: Sequence[Peer], folders: Sequence[str], version: str, trace: SyncTrace) -> None:
        with trace.phase("load"):
            for folder in folders:
                reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
                self._all(peers, "load", lambda peer, body=reload: peer.server.post("/collective_rpc", body))
            named = {"new_version": version}
            self._all(peers, "load", lambda peer: peer.server.post("/update_weight_version", named))

    def _all(
        self, peers: Sequence[Peer], phase: str, call: Callable[[Peer], Coroutine[Any, Any, Any]]
    ) -> list[tuple[Any, float]]:
        return _together(self._loop, peers, phase, call)


def _random_like(source: Source, peers: Sequence[Peer]) -> RandomWeights | None:
    """Weights to spoil the servers' with; None where no probe could tell."""
    model = model_of(source)
    if model is None or any(obstacle(model, peer) for peer in peers):
        return None
    return RandomWeights(metadata_of(source), next(model.parameters()).device)


async def _reset(peer: Peer, path: str) -> None:
    answer = await peer.server.post(path)
    if answer is not None and answer.get("success") is False:
        cache = path.removeprefix("/reset_").replace("_", " ")
        raise WeightSyncError(f"the {cache} could not be reset", phase="reset_cache", receiver=peer.name)


def _together(
    loop: Loop, peers: Sequence[Peer], phase: str, call: Callable[[Peer], Coroutine[Any, Any, Any]]
) -> list[tuple[Any, float]]:
    """The answers of all servers, side by side, and the seconds that each took; any error is a `WeightSyncError`."""

    async def timed(peer: Peer) -> tuple[Any, float]:
        start = time.monotonic()
        return await call(peer), time.monotonic() - start

    async def together() -> list[tuple[Any, float] | BaseException]:
        return await asyncio.gather(*(timed(peer) for peer in peers), return_exceptions=True)

    answers: list[tuple[Any, float]] = []
    for peer, answer in zip(peers, loop.run(together()), strict=True):
        if isinstance(answer, BaseException):
            if isinstance(answer, ServerError):
                raise as_sync_error(answer, phase=phase, receiver=peer.name) from answer
            raise answer
        answers.append(answer)
    return answers


class _Fleet:
    """vLLM's protocol for whoever drives a weight update, for several servers as if they were one."""

    def __init__(self, loop: Loop, peers: Sequence[Peer]) -> None:
        self._loop, self._peers = loop, peers
        self._seconds: dict[str, list[float]] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("init_weight_transfer_engine", "transfer", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("start_weight_update", "transfer", None)

    def update_weights(self, update_info: Any) -> None:
        self._post("update_weights", "transfer", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update", "load", {"weight_version": weight_version})

    def tell(self, span: Span, call: str) -> None:
        """The seconds that each server spent on `call`, all of one sync together, as attributes."""
        if seconds := self._seconds.get(call):
            middle = statistics.median(seconds)
            span.set(
                {names.RECEIVER_MIN: min(seconds), names.RECEIVER_MEDIAN: middle, names.RECEIVER_MAX: max(seconds)}
            )

    def _post(self, call: str, phase: str, body: Any) -> None:
        answers = _together(self._loop, self._peers, phase, lambda peer: peer.server.post(f"/{call}", body))
        before = self._seconds.get(call) or [0.0] * len(answers)
        self._seconds[call] = [total + seconds for total, (_, seconds) in zip(before, answers, strict=True)]
