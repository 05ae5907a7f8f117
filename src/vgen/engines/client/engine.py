"""`ServerEngine`: one or more vLLM servers as one engine."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from ...engine_protocol import BUCKET_BYTES, Batch, HowVerified, PauseMode, Source, SyncTrace, Transport, Verify
from ...errors import EngineError, EngineStateError, ServerError, WeightSyncError
from ...profiling import semconv
from ...types import Completion, SleepReport, WeightVerification
from ...weights.transports.selection import refusal
from ...weights.transports.weight_transport import TransportSettings
from ...weights.verification.verification_phase import Verifier
from ..memory import MemoryReading, sleep_report, sum_of_workers, wake_report
from .adapters import ServerAdapters
from .discovery import discover, require_running
from .endpoint import Endpoint
from .event_loop_thread import EventLoopThread
from .frozen_weights import FrozenWeights
from .http import HttpClient, connection_limit
from .lease_holder import LeaseHolder
from .load_balancer import LoadBalancer
from .shutdown import close, let_go
from .weight_update import WeightUpdater, note_aborts

logger = logging.getLogger(__name__)


class ServerEngine:
    """An `Engine` in front of vLLM servers that hold the same model.

    Requests go to the servers in proportion to their measured speed. Requests that a lost server has not answered go
    to the others, and no completion is requested again once it has arrived. A lost server gets requests again only
    when it is reachable and holds the expected weights.

    Args:
        clients: An HTTP client for each server.
        shape: Sizes of the trainer's model (`vocab_size`, `hidden_size`, …), compared with each server's model.
        vocabulary_size: Of the trainer's model; by default what the servers tell.
        request_timing: Whether completions carry timing; a stock server then needs one call per completion.
        pause_mode: What happens to requests in flight during a weight sync.
        weight_transport: How weights travel, or None for the first transport that trainer and server support.
        weights_folder: Where checkpoints for stock servers are written: a folder that the servers can read.
        bucket_bytes: Size of each of the two buckets that weights travel in.
        weights_port: Where a process group for weights listens on this side; 0 for a free port.
        timeout: Seconds for one batch, and for one call during a weight sync.
        takeover: Whether to take the servers' leases from another trainer that is alive.
        frozen: Whether the servers keep the weights that they have. This engine then takes no lease and changes no
            server, and `stream` raises `EngineError` once another trainer has replaced the weights of one.

    Raises:
        ServerError: A server cannot be reached, or refuses a key.
        EngineError: A server is not vLLM, is too old, holds another model, or belongs to another trainer.
    """

    kind = "server"
    concurrent = True
    verifications: tuple[Verify, ...] = ("logprobs", "none")

    def __init__(
        self,
        clients: Sequence[HttpClient],
        *,
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
        frozen: bool = False,
    ) -> None:
        _check_distinct([client.name for client in clients])
        self.pause_mode: PauseMode = pause_mode
        """What happens to requests in flight during a weight sync."""
        self.vocabulary_size = vocabulary_size or 1 << 31
        self._clients, self._timeout = tuple(clients), timeout
        self.endpoints: list[Endpoint] = []
        """The servers, and what is known of each."""
        self._loop = EventLoopThread()
        self._balancer = LoadBalancer(self._loop, request_timing=request_timing, timeout=timeout)
        self._verifier = Verifier()
        self._stopped = False
        """Whether the caller stopped the schedulers by `pause` or `sleep`. A weight sync then leaves them stopped."""
        self._adapters = ServerAdapters(self._loop, self.endpoints)
        self._cleanup = ExitStack()
        self._end = weakref.finalize(
            self, let_go, self._loop, self.endpoints, self._clients, self._cleanup, os.getpid()
        )
        try:
            self.endpoints += self._discover(shape or ())
            if vocabulary_size is None and all("vocab_size" in endpoint.shape for endpoint in self.endpoints):
                self.vocabulary_size = min(endpoint.shape["vocab_size"] for endpoint in self.endpoints)
            for endpoint in self.endpoints:
                endpoint.vocabulary_size, endpoint.sampler = self.vocabulary_size, self._balancer.stream
                endpoint.frozen, endpoint.http.watch.why_stopped = frozen, endpoint.why_stuck
                _check_model(endpoint, shape or {})
                if fix := refusal(endpoint, weight_transport):
                    raise EngineError(f"{endpoint.name} takes no weights by {weight_transport}: {fix}")
                if not frozen:
                    _check_syncable(endpoint)
            self._frozen = FrozenWeights(self.endpoints) if frozen else None
            self._prepare_servers(takeover)
        except BaseException:
            self.close()
            raise
        settings = TransportSettings(bucket_bytes, weights_folder, weights_port, timeout)
        self._updater = WeightUpdater(self.endpoints, self._loop, weight_transport, settings)
        self._cleanup.callback(self._updater.close)
        self._cleanup.callback(self._adapters.close)
        if any(endpoint.reports_load for endpoint in self.endpoints):
            self.verifications = ("bits", *self.verifications)
        self.model: str = self.endpoints[0].model
        self.max_model_length: int = min(endpoint.max_model_length for endpoint in self.endpoints)
        self.device_type = self.endpoints[0].device_type

    @property
    def weight_version(self) -> str | None:
        """The weight version that all servers hold; None if they differ or do not tell."""
        versions = {endpoint.weight_version for endpoint in self.endpoints}
        return versions.pop() if len(versions) == 1 else None

    def stream(self, batch: Batch) -> Generator[Completion]:
        """Yield each completion as it arrives. Closing early closes the connections, which aborts the rest."""
        if not batch.requests:
            return
        endpoints = self._usable_endpoints()
        if any(request.images for request in batch.requests):
            endpoints = [endpoint for endpoint in endpoints if "batch" in endpoint.features]
            if not endpoints:
                raise ValueError("a stock server takes no images beside token ids: start it with `vgen serve`")
        with self._adapters.served(batch, endpoints) as served:
            endpoints = [endpoint for endpoint in endpoints if not endpoint.lost]
            if self._frozen is None:
                yield from self._balancer.stream(served, endpoints)
                return
            self._frozen.ask(self._loop, endpoints)
            with closing(self._balancer.stream(served, endpoints)) as completions:
                yield from self._frozen.checked(completions)

    def _usable_endpoints(self) -> list[Endpoint]:
        """The servers that hold the expected weights. Asks lost servers whether they are back."""
        silent = [endpoint for endpoint in self.endpoints if endpoint.omits_version and not endpoint.lost]
        if silent:
            self._loop.run_all([endpoint.check_restarted() for endpoint in silent])
        if lost := [endpoint for endpoint in self.endpoints if endpoint.lost]:
            self._loop.run_all([endpoint.has_returned() for endpoint in lost])
        usable = [endpoint for endpoint in self.endpoints if not endpoint.lost]
        if not usable:
            raise ServerError(
                "no reachable server holds the expected weights; a sync_weights() that reaches one brings it back",
                url=", ".join(endpoint.name for endpoint in self.endpoints),
                retryable=True,
            )
        return usable

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        """Pause, transfer and load weights, reset the caches, resume, and verify if that is due.

        With `verify="bits"` servers that cannot compare bits, because they reload their weights, are verified by
        log-probabilities. Without `verify`, servers that were not verified since they started are. After an error the
        weights are unknown: the servers stay paused, and requests in flight end with an error.
        """
        for endpoint in self.endpoints:
            if not endpoint.controlled:
                way_out = "or pass None in place of the model, to generate with the weights that the server has"
                problem = f"it takes no weights: {endpoint.fix}, {way_out}"
                raise WeightSyncError(problem, phase="pause", receiver=endpoint.name)
        self._verifier.new_weights()
        try:
            endpoints = self._updater.sync(
                source, version, trace, verify, mode=self.pause_mode, resume=not self._stopped
            )
            self._verify_synced(endpoints, source, trace, verify)
        except BaseException:
            for endpoint in self.endpoints:
                endpoint.verified = False
            self._balancer.abandon(EngineError("a weight sync failed while this was in flight"))
            raise

    def _verify_synced(
        self, endpoints: Sequence[Endpoint], source: Source, trace: SyncTrace, verify: Verify | None
    ) -> None:
        """Compare the log-probabilities of the servers that need it, or defer that if the schedulers are stopped."""
        hooked = verify is None and self._verifier.has_new_hooks(source)
        due = [endpoint for endpoint in endpoints if hooked or _needs_logprobs(endpoint, verify)]
        if verify == "bits":
            compared = [endpoint for endpoint in endpoints if endpoint not in due]
            trace.set({semconv.VERIFY: "bits" if compared else None})
            for endpoint in compared:
                endpoint.verified = True
        if due:
            done = self._verifier.verify_sync(due, source, trace, awake=not self._stopped, asked=verify is not None)
            for endpoint in due:
                endpoint.verified = done

    def verify_deferred(self, trace: SyncTrace) -> None:
        """Compare log-probabilities, if a sync or a sleep left that for when the servers run again."""
        if not self._stopped:
            verified = self._verifier.resume(trace)
            for endpoint in self.endpoints:
                endpoint.verified = endpoint.verified or endpoint in verified

    def verify(self, source: Source, how: HowVerified, trace: SyncTrace) -> WeightVerification:
        """Compare log-probabilities of every server with those of the source's model."""
        reason = "bits of a server's weights are compared only while a sync sends them" if how == "bits" else ""
        endpoints = self._usable_endpoints()
        report = self._verifier.verify_now(endpoints, source, trace, reason=reason)
        for endpoint in endpoints:
            endpoint.verified = True
        return report

    def pause(self, mode: PauseMode) -> None:
        self._require_control("pause")
        note_aborts(self.endpoints, mode)
        self._note_stopped(True)  # before the servers tell the calls that wait for them
        try:
            self._post_to(self.endpoints, f"/pause?mode={mode}")
        except BaseException:
            self._note_stopped(False)
            raise

    def resume(self) -> None:
        self._require_control("resume")
        self._post_to(self.endpoints, "/resume")
        self._note_stopped(False)

    def sleep(self, level: int) -> SleepReport:
        """Put every server to sleep. Level 2 discards the weights."""
        self._require_control("sleep")
        self._prepare_verification(level)
        before = self._read_memory()
        self._post_to(self.endpoints, f"/sleep?level={level}")
        for endpoint in self.endpoints:
            endpoint.unchecked = False
        self._note_stopped(True)
        return self._memory_report(before, sleep_report)

    def _note_stopped(self, stopped: bool) -> None:
        self._stopped = stopped
        for endpoint in self.endpoints:
            endpoint.stopped = stopped

    def _prepare_verification(self, level: int) -> None:
        """Have the servers verified once after a sleep of this level: their weights, or those of the next sync."""
        due = [each for each in self.endpoints if level not in each.slept and not each.lost]
        self._verifier.before_sleep(due, level, keeps_weights=level == 1 or self.device_type == "cpu")
        for endpoint in due:
            endpoint.slept.add(level)
            endpoint.verified = False

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        """Wake every server, or only the memory of the given tags (`weights`, `kv_cache`)."""
        self._require_control("wake_up")
        before = self._read_memory()
        self._post_to(self.endpoints, "/wake_up?" + "&".join(f"tags={tag}" for tag in tags))
        self._note_stopped(self._stopped and "kv_cache" not in tags)
        return self._memory_report(before, lambda start, end: wake_report([start, end], tags))

    def _memory_report(
        self, before: MemoryReading | None, report: Callable[[MemoryReading, MemoryReading], SleepReport]
    ) -> SleepReport:
        after = self._read_memory() if before is not None else None
        if before is None or after is None:
            return SleepReport(memory_freed=self.device_type != "cpu")
        return report(before, after)

    def _read_memory(self) -> MemoryReading | None:
        """The memory of all workers of all servers together; None if one cannot tell, or has no device."""
        if self.device_type == "cpu" or not all("memory" in endpoint.features for endpoint in self.endpoints):
            return None
        answers = self._post_to(self.endpoints, "/collective_rpc", {"method": "vgen_memory"})
        return sum_of_workers(worker for answer in answers for worker in answer["results"])

    def close(self) -> None:
        """Release the leases and close the connections. The servers keep running."""
        if self._end.detach() is not None:
            close(self._loop, self.endpoints, self._clients, self._cleanup)

    def _discover(self, shape: Collection[str]) -> list[Endpoint]:
        """What the servers are. They share the connections that this process can have."""
        for client in self._clients:
            client.connections = connection_limit(len(self._clients))
        return self._loop.run_all([discover(client, shape) for client in self._clients])

    def _prepare_servers(self, takeover: bool) -> None:
        """Become the client that may change the servers, where they have leases; or, if frozen, see that they run."""
        if self._frozen is not None:
            self._loop.run_all([require_running(endpoint) for endpoint in self.endpoints])
            return
        for endpoint in self.endpoints:
            if endpoint.controlled and "lease" in endpoint.features:
                endpoint.lease = LeaseHolder(endpoint.http, endpoint.mark_unknown)
        leases = [endpoint.lease for endpoint in self.endpoints if endpoint.lease is not None]
        self._loop.run_all([lease.take(self._timeout, takeover=takeover) for lease in leases])

    def _require_control(self, call: str) -> None:
        """Raise `EngineStateError`, before any server is changed, if this client may not change one of them."""
        if self._frozen is not None:
            hint = "it was constructed without the trainer's model, and changes no server"
            raise EngineStateError(call, "frozen", hint)
        for endpoint in self.endpoints:
            if not endpoint.controlled:
                raise EngineStateError(call, f"not under this client's control ({endpoint.name})", endpoint.fix)
        try:
            self._hold_leases(self.endpoints)
        except ServerError as error:
            if error.status != 409:
                raise
            raise EngineStateError(call, "under the lease of another client", str(error)) from error

    def _hold_leases(self, endpoints: Sequence[Endpoint]) -> None:
        """Take leases again that have ended. Raises `ServerError` if another client holds one."""
        self._loop.run_all([endpoint.lease.hold() for endpoint in endpoints if endpoint.lease is not None])

    def _post_to(self, endpoints: Sequence[Endpoint], path: str, body: Any = None, *, json_answer: bool = True) -> Any:
        """POST to several servers concurrently, and return their answers in the same order."""
        return self._loop.run_all([each.http.post(path, body, json_answer=json_answer) for each in endpoints])


def _check_distinct(urls: Sequence[str]) -> None:
    """Raise `ValueError` unless each server is named once, and there is one."""
    if not urls:
        raise ValueError("base_urls must name at least one server")
    if len(set(urls)) < len(urls):
        raise ValueError(f"base_urls names a server twice: {', '.join(urls)}")


def _check_syncable(endpoint: Endpoint) -> None:
    """Raise `EngineError` for a server that could answer from old weights after a weight sync."""
    if endpoint.moves_experts:
        raise EngineError(
            f"{endpoint.name} moves experts while it runs (enable_eplb), so that a weight sync could write to an old "
            "place: start it without --enable-eplb and --eplb-config"
        )
    if endpoint.kv_store_refusal:
        raise EngineError(f"{endpoint.name}: {endpoint.kv_store_refusal}")


def _check_model(endpoint: Endpoint, shape: Mapping[str, int]) -> None:
    """Raise `EngineError` if the server's model has other sizes than the trainer's."""
    for name, size in shape.items():
        if endpoint.shape.get(name, size) != size:
            raise EngineError(
                f"{endpoint.name} serves {endpoint.model!r} with a {name} of {endpoint.shape[name]}, and the trainer's "
                f"model has {size}: start it with the trainer's model"
            )


def _needs_logprobs(endpoint: Endpoint, verify: Verify | None) -> bool:
    """Whether a weight sync must compare the server's log-probabilities."""
    if verify == "bits":
        return endpoint.load_report.get("way", "reload") == "reload"
    return verify == "logprobs" or (verify is None and not endpoint.verified)
