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
from ..weights.buckets import FORMS, as_sync_error
from ..weights.checkpoint import write_checkpoint
from ..weights.group import Backend, GroupTransfer
from ..weights.probe import obstacle
from ..weights.resident import NotResident, ResidentTransfer, uuid_of
from ..weights.shared_memory import SharedMemoryTransfer
from ..weights.source import model_of
from ..weights.spoil import RandomWeights, metadata_of
from ..weights.vllm_transfer import Backend as Native
from ..weights.vllm_transfer import VllmTransfer, available, nccl_problem
from . import weights_route
from .base import PauseMode, Source, SyncTrace, Transport
from .control import this_host
from .http import Loop
from .peer import Peer, held_version, started_anew

logger = logging.getLogger("vgen.engines.server")

_REASONS: dict[tuple[Transport, bool], str] = {
    ("resident", False): "servers on the trainer's own GPU",
    ("shared_memory", False): "servers with vgen's plugin on this host",
    ("nccl", False): "servers with vgen's plugin on other GPUs",
    ("gloo", False): "servers with vgen's plugin on other hosts",
    ("nccl", True): "servers with vLLM's own NCCL engine",
    ("checkpoint", True): "servers without vgen's plugin reload from a folder",
}
"""Of a transport, to servers with vgen's plugin or to stock ones."""
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
        port: int = 0,
        timeout: float,
    ) -> None:
        self._transport: Transport | None = transport
        self._peers, self._loop, self._folder, self._bucket_bytes = peers, loop, folder, bucket_bytes
        self._port, self._timeout = port, timeout
        self._resident = ResidentTransfer()
        self._transfers: dict[tuple[Transport, bool], tuple[Any, Any]] = {}
        """By what the transfer is for, and itself."""

    def sync(
        self,
        source: Source,
        version: str,
        trace: SyncTrace,
        *,
        mode: PauseMode,
        resume: bool,
        spoil: bool,
        verify_bits: bool = False,
    ) -> list[Peer]:
        """Replace the weights of every server that can be reached; returns these. Raises `WeightSyncError`.

        With `spoil`, where one of them was never verified, random weights go before: see `weights.spoil`. With
        `verify_bits` those whose `loaded["way"]` is then not `reload` have compared every destination with its source.
        """
        peers = self._reachable(trace)
        groups, reasons, table = self._chosen(source, peers)
        random = _random_like(source, peers) if spoil and not all(peer.verified for peer in peers) else None
        trace.set(
            {
                names.TRANSPORT: "+".join(dict.fromkeys(kind for kind, _ in groups)),
                names.TRANSPORT_REASON: "; ".join(reasons),
                names.SYNC_RECEIVERS: len(peers),
            }
        )
        reloading = [*groups.pop(("checkpoint", True), ()), *groups.pop(("checkpoint", False), ())]
        with ExitStack() as folders:
            written = list[str]()
            if reloading:  # before the pause: the servers generate while it is written
                sources = [source] if random is None else [random, source]
                with trace.phase("transfer") as span:
                    written = [folders.enter_context(self._written(weights)) for weights in sources]
                    span.set({names.GATHER_SECONDS: source.seconds})
            paused_at = time.monotonic()
            with trace.phase("pause"):
                self._all(peers, "pause", lambda peer: peer.server.post(f"{_pause_of(peer)}?mode={mode}"))
            for group, those in groups.items():
                if group[0] == "resident":
                    self._copy(those, table, source, version, trace, verify_bits)
                else:
                    self._send(group, those, random, source, version, trace, verify_bits)
            if reloading:
                self._reload(reloading, written, version, trace)
        with trace.phase("reset_cache"):
            telling = [peer for peer in peers if peer not in reloading and not peer.stock]
            self._all(peers, "reset_cache", lambda peer: _reset_caches(peer, told=peer in telling))
        if resume:
            with trace.phase("resume"):
                self._all(peers, "resume", lambda peer: peer.server.post("/resume"))
        reloads = [peer.loaded["reason"] for peer in peers if peer.loaded.get("reason")]
        trace.set(
            {
                names.PAUSED_SECONDS: time.monotonic() - paused_at,
                names.PLAN_WAY: "+".join(sorted({peer.loaded["way"] for peer in peers if peer.loaded})) or None,
                names.PLAN_REASON: "; ".join(dict.fromkeys(reloads)) or None,
            }
        )
        for peer in peers:
            peer.lost, peer.weight_version = False, version
        return peers

    def close(self) -> None:
        """Give the buckets' memory back."""
        for _, transfer in self._transfers.values():
            transfer.close()
        self._transfers.clear()

    def _chosen(
        self, source: Source, peers: Sequence[Peer]
    ) -> tuple[dict[tuple[Transport, bool], list[Peer]], list[str], Any]:
        """How the weights go to each server, and whether it is a stock one; why; and where they lie, for `resident`."""
        device = _device(source)
        on_gpu = [peer for peer in peers if "resident" in peer.features and peer.device_type == "cuda"]
        self._all([peer for peer in on_gpu if peer.devices is None], "pause", _ask_devices)
        beside = [peer for peer in on_gpu if device is not None and peer.devices == {uuid_of(device)}]
        reasons, table = list[str](), None
        if self._transport == "resident" or (beside and self._transport is None):
            try:
                table = self._resident.table(source)
            except NotResident as error:
                if self._transport:
                    raise WeightSyncError(str(error), phase="gather", receiver="trainer") from error
                beside = []
                reasons.append(f"not resident: {error}")
        wanted = self._transport is None and any(_native(peer, device) for peer in peers)
        if problem := nccl_problem() if wanted else "":
            reasons.append(f"not nccl: {problem}")
        groups = dict[tuple[Transport, bool], list[Peer]]()
        for peer in peers:
            kind = self._transport or _kind(peer, device, peer in beside, not problem)
            groups.setdefault((kind, peer.stock), []).append(peer)
        if others := [peer.name for peer in groups.get(("resident", False), ()) if peer not in beside]:
            raise WeightSyncError("not on the trainer's own GPU", phase="transfer", receiver=", ".join(others))
        if device is None and (asked := next((kind for kind, stock in groups if stock and kind != "checkpoint"), None)):
            raise WeightSyncError(f"it is not on a GPU, as {asked} needs it", phase="gather", receiver="trainer")
        return groups, ["asked for"] if self._transport else [*(_REASONS[kind] for kind in groups), *reasons], table

    def _reachable(self, trace: SyncTrace) -> list[Peer]:
        """All servers, but for those that were lost before and still are; and who else has changed their weights."""

        async def version(peer: Peer) -> str | ServerError | None:
            try:
                held = await held_version(peer.server)
                if peer.lost or started_anew(held, peer.weight_version):
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

    def _copy(
        self, peers: Sequence[Peer], table: Any, source: Source, version: str, trace: SyncTrace, verify_bits: bool
    ) -> None:
        fleet = _Fleet(self._loop, peers)
        with trace.phase("load") as span:
            self._resident.send(fleet, table, version, verify=verify_bits)
            span.set({names.GATHER_SECONDS: source.seconds})
            fleet.tell(span, weights_route.WHOLE)

    def _send(
        self,
        group: tuple[Transport, bool],
        peers: Sequence[Peer],
        random: RandomWeights | None,
        source: Source,
        version: str,
        trace: SyncTrace,
        verify_bits: bool,
    ) -> None:
        fleet = _Fleet(self._loop, peers)
        transfer = self._transfer(group, peers, source, fleet)
        transfer.verify = verify_bits
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
            fleet.tell(span, "/update_weights")
        with trace.phase("load") as span:
            transfer.finish(version)
            fleet.tell(span, "/finish_weight_update")

    def _transfer(self, group: tuple[Transport, bool], peers: Sequence[Peer], source: Source, fleet: _Fleet) -> Any:
        """The one that was used the last time, where it still fits."""
        kind, stock = group
        device = _device(source) if kind in ("nccl", "ipc") else None
        wanted = device, tuple((peer.name, peer.workers, peer.starts if stock else 0) for peer in peers)
        known, transfer = self._transfers.get(group, (None, None))
        if known != wanted:
            if transfer is not None:
                transfer.close()
            own: dict[str, Any] = dict(bucket_bytes=self._bucket_bytes)
            meeting: dict[str, Any] = dict(port=self._port, timeout=self._timeout)
            if kind == "shared_memory":
                transfer = SharedMemoryTransfer(fleet, **own)
            elif stock:
                assert device is not None  # `_chosen` has seen to that
                engine: Native = "ipc" if kind == "ipc" else "nccl"
                own |= dict(backend=engine, url=peers[0].name, workers=sum(peer.workers for peer in peers))
                transfer = VllmTransfer(fleet, device=device, **own, **meeting)
            else:
                backend: Backend = "nccl" if kind == "nccl" else "gloo"
                own |= dict(backend=backend, workers={peer.name: peer.workers for peer in peers})
                transfer = GroupTransfer(fleet, device=device or torch.device("cpu"), **own, **meeting)
            self._transfers[group] = wanted, transfer
        transfer.client = fleet
        return transfer

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


def _kind(peer: Peer, device: torch.device | None, beside: bool, nccl: bool) -> Transport:
    """The first of the transports that trainer and server can both take; `nccl` tells of vLLM's engine here."""
    if "shared_memory" not in peer.features:
        return "nccl" if nccl and _native(peer, device) else "checkpoint"
    if beside:
        return "resident"
    if "group" not in peer.features:
        return "shared_memory"
    if device is not None and peer.device_type == "cuda" and uuid_of(device) not in (peer.devices or ()):
        return "nccl"
    return "shared_memory" if peer.host == this_host() else "gloo"


def _native(peer: Peer, device: torch.device | None) -> bool:
    """Whether a stock server waits for a trainer on a GPU by vLLM's NCCL engine. Its IPC is for who asks for it."""
    return peer.stock and peer.backend == "nccl" and device is not None


def refusal(peer: Peer, transport: Transport | None) -> str:
    """What to do so that a server takes weights by the `transport` that was asked for; empty where it does."""
    if transport in (None, "checkpoint"):
        return ""
    if transport == "ipc" and peer.features:
        return "`resident` takes its place on a server that `vgen serve` has started"
    if transport in ("nccl", "ipc") and not peer.features:
        if peer.backend != transport:
            return f'start it with `vgen serve`, or --weight-transfer-config \'{{"backend": "{transport}"}}\''
        return "" if available() else "install vLLM beside the trainer, whose side of it is vLLM's too"
    needed = "group" if transport in ("nccl", "gloo") else transport
    return "" if needed in peer.features else "start it with `vgen serve`"


def _device(source: Source) -> torch.device | None:
    """The GPU that the trainer's model is on."""
    model = model_of(source)
    device = next((parameter.device for parameter in model.parameters()), None) if model is not None else None
    return device if device is not None and device.type == "cuda" else None


async def _ask_devices(peer: Peer) -> None:
    answer = await peer.server.post("/collective_rpc", {"method": "vgen_device"})
    peer.devices = frozenset(str(found) for found in answer["results"])


def _pause_of(peer: Peer) -> str:
    return weights_route.PAUSE if "pause" in peer.features else "/pause"


async def _reset_caches(peer: Peer, *, told: bool) -> None:
    """Reset them, and have the server tell how it has loaded what it was `told`."""
    await asyncio.gather(*(_reset(peer, path) for path in _CACHES), _ask_loaded(peer, told=told))


async def _ask_loaded(peer: Peer, *, told: bool) -> None:
    peer.loaded = {} if told else {"way": "reload", "reason": ""}
    if told and peer.tells:
        answer = await peer.server.post("/collective_rpc", {"method": "vgen_weights"})
        workers = answer["results"]
        # where one worker of several reloads, bits were not compared everywhere
        peer.loaded = next((found for found in workers if found.get("way") == "reload"), workers[0])


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
        """In a group each server has a place of its own; one of an older vgen is not told what will come.

        vLLM's own engine means the place of the first of them.
        """
        offsets, offset = dict[str, int](), 1
        for peer in self._peers:
            offsets[peer.name] = offset
            offset += peer.workers

        def body(peer: Peer) -> Any:
            own = {"rank_offset": offsets[peer.name]} if {"group", "rank_offset"} & init_info.keys() else {}
            known = "recorded" in peer.features
            return {"init_info": {name: told for name, told in init_info.items() if known or name not in FORMS} | own}

        self._post("/init_weight_transfer_engine", "transfer", body)

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", "transfer", lambda peer: None)

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", "transfer", lambda peer: {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", "load", lambda peer: {"weight_version": weight_version})

    def whole_update(self, update_info: Any, version: str | None, init_info: Any = None) -> None:
        body: dict[str, Any] = {"update_info": update_info, "weight_version": version}
        body |= {} if init_info is None else {"init_info": init_info}
        self._post(weights_route.WHOLE, "load", lambda peer: body)

    def tell(self, span: Span, call: str) -> None:
        """The seconds that each server spent on `call`, all of one sync together, as attributes."""
        if seconds := self._seconds.get(call):
            middle = statistics.median(seconds)
            span.set(
                {names.RECEIVER_MIN: min(seconds), names.RECEIVER_MEDIAN: middle, names.RECEIVER_MAX: max(seconds)}
            )

    def _post(self, call: str, phase: str, body: Callable[[Peer], Any]) -> None:
        answers = _together(self._loop, self._peers, phase, lambda peer: peer.server.post(call, body(peer)))
        before = self._seconds.get(call) or [0.0] * len(answers)
        self._seconds[call] = [total + seconds for total, (_, seconds) in zip(before, answers, strict=True)]
