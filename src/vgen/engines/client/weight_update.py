"""New weights for one or more servers: choose transports, pause, send, reset the caches, resume."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from ...engine_protocol import PauseMode, Source, SyncTrace, Transport, Verify
from ...errors import ServerError, WeightSyncError, error_from_dict
from ...profiling import semconv
from ...weights.load.definition_audit import audit_definition
from ...weights.load.random_weights import RandomWeights
from ...weights.source.module_source import metadata_of
from ...weights.transports.buckets import FORMS, FORMS_NAME, TIES, forms_of
from ...weights.transports.selection import choose, transports_of
from ...weights.transports.weight_transport import TransportSettings, WeightTransport, WeightUpdate
from ...weights.verification.logprob_check import obstacle
from .. import server_api
from ..audit_report import audit_attributes, joined
from .endpoint import RESET_PREFIX_CACHE, Endpoint, held_version, was_restarted
from .endpoint_group import ServerGroup, call_all
from .event_loop_thread import EventLoopThread

logger = logging.getLogger("vgen.engines.client.engine")

_CACHES = (RESET_PREFIX_CACHE, "/reset_mm_cache", "/reset_encoder_cache")


class WeightUpdater:
    """Sends weights to several servers, all of them together. No call is ever repeated.

    Args:
        endpoints: The servers.
        loop: Runs the HTTP calls.
        transport: The transport that the user asked for; None for the first one that a server supports.
        settings: For all transports.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        loop: EventLoopThread,
        transport: Transport | None,
        settings: TransportSettings,
    ) -> None:
        self._endpoints, self._loop = endpoints, loop
        self._transport: Transport | None = transport
        self._transports = transports_of(settings)
        self._call_all = partial(call_all, loop)

    def sync(
        self, source: Source, version: str, trace: SyncTrace, verify: Verify | None, *, mode: PauseMode, resume: bool
    ) -> list[Endpoint]:
        """Replace the weights of every server that can be reached, and return these. Raises `WeightSyncError`.

        Without `verify`, if one of the servers was never verified, random weights are sent first: see
        `weights.load.random_weights`. With `bits`, servers whose `load_report["way"]` is not `reload` afterwards have
        compared every destination with its source.
        """
        endpoints = self._reachable(trace)
        for each in endpoints:
            each.updating = True
        try:
            self._update(endpoints, source, version, trace, verify, mode=mode, resume=resume)
        finally:
            for each in endpoints:
                each.updating = False
        return endpoints

    def _update(
        self,
        endpoints: list[Endpoint],
        source: Source,
        version: str,
        trace: SyncTrace,
        verify: Verify | None,
        *,
        mode: PauseMode,
        resume: bool,
    ) -> None:
        self._wake(endpoints)
        on_gpu = [each for each in endpoints if "resident" in each.features and each.device_type == "cuda"]
        self._call_all([each for each in on_gpu if each.devices is None], "pause", _ask_devices)
        choice = choose(self._transports, endpoints, source, self._transport, partial(ServerGroup, self._loop))
        randomize = verify is None and not all(each.verified for each in endpoints)
        random = _random_like(source, endpoints) if randomize else None
        trace.set({semconv.TRANSPORT: choice.names, semconv.TRANSPORT_REASON: choice.reasons})
        trace.set({semconv.SYNC_RECEIVERS: len(endpoints)})
        self._audit(choice.served, source, trace)
        update = WeightUpdate(source, version, trace, random, verify == "bits")
        with ExitStack() as prepared:
            for transport in choice.served:
                prepared.enter_context(transport.prepared(update))
            paused_at = time.monotonic()
            note_aborts(endpoints, mode)
            with trace.phase("pause"):
                self._call_all(endpoints, "pause", lambda each: each.http.post(f"{_pause_path(each)}?mode={mode}"))
            for transport in choice.served:
                transport.send(update)
        with trace.phase("reset_cache"):
            reloading = [each for transport, served in choice.served.items() if transport.reloads for each in served]
            self._call_all(endpoints, "reset_cache", lambda each: _reset_caches(each, reloaded=each in reloading))
        if resume:
            with trace.phase("resume"):
                self._call_all(endpoints, "resume", lambda each: each.http.post("/resume"))
        trace.set({semconv.PAUSED_SECONDS: time.monotonic() - paused_at, **_load_report(endpoints)})
        _note_version(endpoints, version)

    def close(self) -> None:
        """Free the memory of the buckets, and leave process groups."""
        for transport in self._transports:
            transport.close()

    def _wake(self, endpoints: Sequence[Endpoint]) -> None:
        """Wake the servers that another client has left asleep: no memory of theirs may be written before."""
        for each in endpoints:
            each.unknown = False
        self._call_all([each for each in endpoints if each.unchecked], "pause", Endpoint.wake)

    def _audit(self, served: Mapping[WeightTransport, Sequence[Endpoint]], source: Source, trace: SyncTrace) -> None:
        """Audit what servers will load by vLLM's own ways, if it has changed. Raises `WeightSyncError`.

        The workers of `vgen serve` do it themselves; for a stock server, this process has another one do it.
        """
        for each in self._endpoints:
            each.audit = {}
        reloading = [each for transport, some in served.items() if transport.reloads for each in some]
        if not reloading:
            return
        metadata, ties = metadata_of(source), source.ties()
        forms = forms_of(metadata, ties)
        changed = [each for each in reloading if each.audited[0] != forms[FORMS_NAME]]
        call = {"method": "vgen_audit", "kwargs": {FORMS: forms[FORMS], TIES: forms[TIES]}}

        async def audit(endpoint: Endpoint) -> None:
            answer = await endpoint.http.post("/collective_rpc", call)
            workers = answer["results"]
            for worker in workers:
                if "error" in worker:
                    raise error_from_dict(worker["error"])
            endpoint.audited = forms[FORMS_NAME], joined(workers)

        self._call_all([each for each in changed if each.reports_load], "audit", audit)
        if stock := [each for each in changed if not each.reports_load]:
            with trace.phase("audit"):
                reports: dict[str, dict[str, Any]] = {}
                for each in stock:
                    key = str(each.definition)
                    if key not in reports:
                        reports[key] = audit_definition(each.definition, metadata, ties, each.name)
                    each.audited = forms[FORMS_NAME], reports[key]
        for each in reloading:
            each.audit = each.audited[1]

    def _reachable(self, trace: SyncTrace) -> list[Endpoint]:
        """All servers except those that were lost before and still are. Reports weights that another trainer sent.

        Raises `WeightSyncError` if another server cannot be reached, or none can, or another client has a lease.
        """

        async def version(endpoint: Endpoint) -> str | ServerError | None:
            try:
                if endpoint.lease is None:
                    held = await held_version(endpoint.http)
                else:
                    held, _ = await asyncio.gather(held_version(endpoint.http), endpoint.lease.hold())
                if endpoint.lost or was_restarted(held, endpoint.weight_version):
                    endpoint.rejoin()
                return held
            except ServerError as error:
                return error

        reachable: list[Endpoint] = []
        lost = {endpoint.name for endpoint in self._endpoints if endpoint.lost}
        versions = self._loop.run_all([version(endpoint) for endpoint in self._endpoints])
        for endpoint, held in zip(self._endpoints, versions, strict=True):
            if isinstance(held, ServerError):
                if endpoint.name not in lost or held.status == 409:  # 409: it is reachable, and another client's
                    raise WeightSyncError(str(held), phase="pause", receiver=endpoint.name) from held
                logger.warning("vgen: %s still cannot be reached, and is left out of this weight sync", endpoint.name)
                continue
            if not endpoint.lost and held != endpoint.weight_version:
                trace.set({semconv.FOREIGN_VERSION: held})
                message = "vgen: %s has weights %r, sent by another trainer; this trainer expected %r"
                logger.warning(message, endpoint.name, held, endpoint.weight_version)
            reachable.append(endpoint)
        if not reachable:
            names = ", ".join(endpoint.name for endpoint in self._endpoints)
            raise WeightSyncError("no server can be reached", phase="pause", receiver=names)
        return reachable


def _random_like(source: Source, endpoints: Sequence[Endpoint]) -> RandomWeights | None:
    """Random weights like those of `source`; None if a comparison of log-probabilities is impossible afterwards."""
    model = source.model
    if model is None or any(obstacle(model, endpoint) for endpoint in endpoints):
        return None
    return RandomWeights(metadata_of(source), next(model.parameters()).device, ties=source.ties())


async def _ask_devices(endpoint: Endpoint) -> None:
    answer = await endpoint.http.post("/collective_rpc", {"method": "vgen_device"})
    endpoint.devices = frozenset(str(device) for device in answer["results"])


def note_aborts(endpoints: Sequence[Endpoint], mode: PauseMode) -> None:
    """Note that this client has all requests aborted, if a pause of this mode does that: its caller asked for it."""
    for each in endpoints if mode == "abort" else ():
        each.aborts += 1


def _note_version(endpoints: Sequence[Endpoint], version: str) -> None:
    """Note which weights the servers have now. Raises `WeightSyncError` if another trainer may have interfered."""
    for each in endpoints:
        if each.unknown:
            problem = "the lease ended during the sync, and another trainer may have held it meanwhile"
            raise WeightSyncError(problem, phase="load", receiver=each.name)
    for each in endpoints:
        each.lost, each.weight_version = False, version


def _pause_path(endpoint: Endpoint) -> str:
    return server_api.PAUSE if server_api.Feature.PAUSE in endpoint.features else "/pause"


async def _reset_caches(endpoint: Endpoint, *, reloaded: bool) -> None:
    """Reset all caches, and at the same time ask how the weights were loaded, if the server has not `reloaded` them."""
    await asyncio.gather(*(_reset(endpoint, path) for path in _CACHES), _ask_loaded(endpoint, reloaded=reloaded))


async def _ask_loaded(endpoint: Endpoint, *, reloaded: bool) -> None:
    endpoint.load_report = {"way": "reload", "reason": ""} if reloaded else {}
    if not reloaded and endpoint.reports_load:
        answer = await endpoint.http.post("/collective_rpc", {"method": "vgen_weights"})
        workers = answer["results"]
        # If one of several workers has reloaded, bits were not compared everywhere.
        endpoint.load_report = next((each for each in workers if each.get("way") == "reload"), workers[0])


def _load_report(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """How the servers have loaded their weights, as attributes."""
    reasons = [each.load_report["reason"] for each in endpoints if each.load_report.get("reason")]
    return {
        semconv.PLAN_WAY: "+".join(sorted({each.load_report["way"] for each in endpoints if each.load_report})) or None,
        semconv.PLAN_REASON: "; ".join(dict.fromkeys(reasons)) or None,
        **audit_attributes([each.audit or each.load_report for each in endpoints]),
    }


async def _reset(endpoint: Endpoint, path: str) -> None:
    answer = await endpoint.http.post(path)
    if answer is not None and answer.get("success") is False:
        cache = path.partition("?")[0].removeprefix("/reset_").replace("_", " ")
        raise WeightSyncError(f"the {cache} could not be reset", phase="reset_cache", receiver=endpoint.name)
