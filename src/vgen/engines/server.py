"""One or more vLLM servers as one engine."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import EngineError, EngineStateError, ServerError, WeightSyncError
from ..profiling import names
from ..types import Completion, LoRARequest, SleepReport
from ..weights.verified import Deferred, verified
from .adapters import fingerprint
from .base import BUCKET_BYTES, Batch, PauseMode, Source, SyncTrace, Transport, Verify
from .dispatch import Work, serve
from .http import Loop, Server
from .memory import Reading, reading_of, slept, woken
from .peer import LeaseHolder, Peer, describe
from .update import Updater, refusal

T = TypeVar("T")
logger = logging.getLogger("vgen.engines.server")

GRACE_SECONDS = 5.0
"""What is waited for beyond a deadline: whoever keeps it says more than the clock does."""


class _Alone:
    """One of the servers, for a probe."""

    def __init__(self, engine: ServerEngine, peer: Peer) -> None:
        self._engine, self._peer = engine, peer
        self.kind, self.device_type, self.max_model_length = peer.name, peer.device_type, peer.max_model_length
        self.dtype, self.quantization, self.vocabulary_size = peer.dtype, peer.quantization, engine.vocabulary_size

    def stream(self, batch: Batch) -> Generator[Completion]:
        return self._engine.stream_from(batch, [self._peer])


class ServerEngine:
    """An `Engine` in front of vLLM servers that hold the same model.

    Requests are spread by how fast each server has been; what a lost one has not answered goes to the others, and
    a completion that has arrived is never asked for again. A server that was lost is given work again only once it
    holds the weights that it should.
    """

    kind = "server"
    concurrent = True
    verifications: tuple[Verify, ...] = ("logprobs", "none")

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        model: str | None = None,
        shape: Mapping[str, int] | None = None,
        vocabulary_size: int | None = None,
        request_timing: bool = True,
        pause_mode: PauseMode = "keep",
        weight_transport: Transport | None = None,
        weights_folder: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        weights_port: int = 0,
        timeout: float = 600.0,
        takeover: bool = False,
    ) -> None:
        if not servers:
            raise ValueError("base_urls must name at least one server")
        urls = [server.name for server in servers]
        if len(set(urls)) < len(urls):
            raise ValueError(f"base_urls names a server twice: {', '.join(urls)}")
        self._request_timing, self._timeout = request_timing, timeout
        self.pause_mode: PauseMode = pause_mode
        """What becomes of requests in flight during a sync."""
        self._loop = Loop()
        self._in_flight: set[Work] = set()
        self._deferred: tuple[Deferred, list[Peer]] | None = None
        """What is left to be verified, and where."""
        self._held = False
        """Scheduling was stopped, by a pause or a sleep, and is not for a sync to start again."""
        self._adapters = threading.Lock()
        self._peers: list[Peer] = []
        self._servers = tuple(servers)
        try:
            self._peers = self._gather([describe(server, shape or ()) for server in servers])
            for peer in self._peers:
                if model is not None and model != peer.model:
                    raise EngineError(f"{peer.name} serves {peer.model!r}, not {model!r}: start it with that model")
                if fix := refusal(peer, weight_transport):
                    raise EngineError(f"{peer.name} takes no weights by {weight_transport}: {fix}")
                for field, own in (shape or {}).items():
                    if peer.shape.get(field, own) != own:
                        raise EngineError(
                            f"{peer.name} serves {peer.model!r} with a {field} of {peer.shape[field]}, and the "
                            f"trainer's model has {own}: start it with the trainer's model"
                        )
            self._take_leases(takeover)
        except BaseException:
            self.close()
            raise
        self._updater = Updater(
            self._peers,
            self._loop,
            transport=weight_transport,
            folder=weights_folder,
            bucket_bytes=bucket_bytes,
            port=weights_port,
            timeout=timeout,
        )
        if any(peer.tells for peer in self._peers):
            self.verifications = ("bits", *self.verifications)
        self.model: str = self._peers[0].model
        self.max_model_length: int = min(peer.max_model_length for peer in self._peers)
        self.vocabulary_size = vocabulary_size or 1 << 31
        self.device_type = self._peers[0].device_type

    @property
    def peers(self) -> tuple[Peer, ...]:
        """The servers, and what each has said of itself."""
        return tuple(self._peers)

    @property
    def weight_version(self) -> str | None:
        """What the servers say that they hold; None where they differ or do not say."""
        versions = {peer.weight_version for peer in self._peers}
        return versions.pop() if len(versions) == 1 else None

    def stream(self, batch: Batch) -> Generator[Completion]:
        """Yield each completion as it arrives. Leaving early hangs up, which aborts the rest on the servers."""
        if not batch.requests:
            return
        self._load_adapter(batch.lora_request)
        peers = self._ready()
        if any(request.images for request in batch.requests):
            peers = [peer for peer in peers if "batch" in peer.features]
            if not peers:
                raise ValueError("a stock server takes no images beside token ids: start it with `vgen serve`")
        yield from self.stream_from(batch, peers)

    def stream_from(self, batch: Batch, peers: Sequence[Peer]) -> Generator[Completion]:
        """`stream` from these servers alone."""
        work = Work(batch, self._request_timing, self._timeout)
        self._in_flight.add(work)
        future = self._loop.start(serve(work, peers))
        future.add_done_callback(work.finish)
        batch.cancellation.then(lambda: work.arrived.put(asyncio.CancelledError()))
        try:
            for _ in batch.requests:
                try:
                    arrived = work.arrived.get(timeout=work.left + GRACE_SECONDS)
                except queue.Empty:
                    who = ", ".join(peer.name for peer in peers)
                    raise EngineError(f"{who} did not answer all within {self._timeout:g} s") from None
                if isinstance(arrived, BaseException):
                    raise arrived
                yield arrived
        finally:
            self._in_flight.discard(work)
            future.cancel()

    def _ready(self) -> list[Peer]:
        """The servers whose weights are known. Those that were lost are asked whether they are back."""
        if silent := [peer for peer in self._peers if peer.silent and not peer.lost]:
            self._gather([peer.look() for peer in silent])
        if any(peer.lost for peer in self._peers):
            self._gather([peer.back() for peer in self._peers if peer.lost])
        ready = [peer for peer in self._peers if not peer.lost]
        if not ready:
            raise ServerError(
                "no server is there with the weights that it should hold; a sync_weights() that reaches it helps",
                url=", ".join(peer.name for peer in self._peers),
                retryable=True,
            )
        return ready

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        """Pause, send the weights by whatever each server can take, reset the caches, resume, verify where due.

        Where bits cannot be compared, because a server reloads its weights, log-probabilities are.
        A server that failed in the middle stays paused, and requests in flight end with an error: its weights are
        unknown.
        """
        for peer in self._peers:
            if not peer.controlled:
                raise WeightSyncError(f"it takes no weights: {peer.fix}", phase="pause", receiver=peer.name)
        self._deferred = None
        try:
            peers = self._updater.sync(
                source,
                version,
                trace,
                mode=self.pause_mode,
                resume=not self._held,
                spoil=verify is None,
                verify_bits=verify == "bits",
            )
            due = [peer for peer in peers if _due(peer, verify)]
            if verify == "bits":
                compared = [peer for peer in peers if peer not in due]
                trace.set({names.VERIFY: "bits" if compared else None})
                for peer in compared:
                    peer.verified = True
            if due:
                alone = [_Alone(self, peer) for peer in due]
                deferred = verified(alone, source, trace, awake=not self._held, asked=verify is not None)
                self._deferred = (deferred, due) if deferred is not None else None
                for peer in due:
                    peer.verified = deferred is None
        except BaseException:
            for peer in self._peers:
                peer.verified = False
            self._abandon(EngineError("a weight sync failed while this was in flight"))
            raise

    def verify(self, trace: SyncTrace) -> None:
        """Compare log-probabilities, where a sync came while the servers were paused or asleep."""
        if self._held or self._deferred is None:
            return
        (deferred, peers), self._deferred = self._deferred, None
        deferred.compare(trace)
        for peer in peers:
            peer.verified = True

    def _abandon(self, error: EngineError) -> None:
        for work in tuple(self._in_flight):
            work.arrived.put(error)

    def pause(self, mode: PauseMode) -> None:
        self._control(lambda peer: peer.server.post(f"/pause?mode={mode}"))
        self._held = True

    def resume(self) -> None:
        self._control(lambda peer: peer.server.post("/resume"))
        self._held = False

    def sleep(self, level: int) -> SleepReport:
        """Put every server to sleep."""
        before = self._memory()
        self._control(lambda peer: peer.server.post(f"/sleep?level={level}"))
        self._held = True
        for peer in self._peers if level == 2 and self.device_type != "cpu" else ():
            if not peer.slept:  # what brings the weights back is verified once: something else may be gone, too
                peer.slept, peer.verified = True, False
        after = self._memory() if before is not None else None
        if before is None or after is None:
            return SleepReport(memory_freed=self.device_type != "cpu")
        return slept(before, after)

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        """Wake every server."""
        query = "&".join(f"tags={tag}" for tag in tags)
        before = self._memory()
        self._control(lambda peer: peer.server.post(f"/wake_up?{query}"))
        self._held = self._held and "kv_cache" not in tags
        after = self._memory() if before is not None else None
        if before is None or after is None:
            return SleepReport(memory_freed=self.device_type != "cpu")
        return woken([before, after], tags)

    def _memory(self) -> Reading | None:
        """Of all workers of all servers; None where one cannot say, or has no device."""
        if self.device_type == "cpu" or not all("memory" in peer.features for peer in self._peers):
            return None
        ask = {"method": "vgen_memory"}
        answers = self._gather([peer.server.post("/collective_rpc", ask) for peer in self._peers])
        return reading_of(worker for answer in answers for worker in answer["results"])

    def close(self) -> None:
        """Release the leases and close the connections. The servers go on."""

        async def end() -> None:
            leases = [peer.lease.release() for peer in self._peers if peer.lease is not None]
            await asyncio.gather(*leases, return_exceptions=True)
            await asyncio.gather(*(server.close() for server in self._servers), return_exceptions=True)

        if hasattr(self, "_updater"):
            self._updater.close()
        try:
            self._loop.run(end(), GRACE_SECONDS)
        except TimeoutError:
            logger.warning("vgen: connections were left behind: servers did not answer within %g s", GRACE_SECONDS)
        self._loop.close()

    def _take_leases(self, takeover: bool) -> None:
        """Be the one who may change the servers, where they know leases."""
        for peer in self._peers:
            if peer.controlled and "lease" in peer.features:
                peer.lease = LeaseHolder(peer.server)
        self._gather([peer.lease.take(self._timeout, takeover=takeover) for peer in self._peers if peer.lease])

    def _load_adapter(self, wanted: LoRARequest | None) -> None:
        """Have every server load a LoRA adapter that it has not yet, or that has changed since."""
        if wanted is None or not wanted.lora_path:
            return
        with self._adapters:
            found = fingerprint(wanted.lora_path)
            missing = [peer for peer in self._peers if peer.adapters.get(wanted.lora_name) != found]
            body = {"lora_name": wanted.lora_name, "lora_path": wanted.lora_path, "load_inplace": True}
            try:
                self._gather([peer.server.tell("/v1/load_lora_adapter", body) for peer in missing])
                # its entries of the adapter go by its name and path
                changed = [peer for peer in missing if wanted.lora_name in peer.adapters]
                self._gather([peer.server.post("/reset_prefix_cache") for peer in changed])
            except ServerError as error:
                fix = (
                    "start the server by `vgen serve` with --enable-lora and --max-lora-rank, and pass its control_key"
                )
                raise ValueError(f"LoRA adapter {wanted.lora_name!r} was not loaded: {error}; {fix}") from error
            for peer in missing:
                peer.adapters[wanted.lora_name] = found

    def _control(self, call: Callable[[Peer], Coroutine[Any, Any, Any]]) -> None:
        """`call` for every server, side by side; one that does not take it is refused before any is asked."""
        for peer in self._peers:
            if not peer.controlled:
                raise EngineStateError("that", f"beyond control ({peer.name})", peer.fix)
        self._gather([call(peer) for peer in self._peers])

    def _gather(self, calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """The results of `calls`, made side by side. All have ended before the first error is raised."""

        async def together() -> list[T | BaseException]:
            return await asyncio.gather(*calls, return_exceptions=True)

        results = self._loop.run(together())
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]


def _due(peer: Peer, verify: Verify | None) -> bool:
    """Whether its log-probabilities are to be compared."""
    if verify == "bits":
        return peer.loaded.get("way", "reload") == "reload"
    return verify == "logprobs" or (verify is None and not peer.verified)
