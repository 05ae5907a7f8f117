"""Weight syncs: as a span, a report and a version, and as links from rollouts to the syncs of their weights."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ..arguments import INT63, integer, shown, text
from ..engine_protocol import Engine, EngineState, HowVerified, Source, Verify
from ..errors import ArgumentError, EngineStateError
from ..profiling import Link, ProfilingContext, Span, semconv
from ..types import Completions, SyncReport, WeightVerification
from .lifecycle import Lifecycle
from .memory_telemetry import record_memory

logger = logging.getLogger(__name__)

KNOWN_SYNCS = 16
"""How many of the last syncs a rollout can link to."""


class SyncHistory:
    """The spans of the last syncs, by the version of the weights that each sync brought."""

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}

    def add(self, span: Span, version: str) -> None:
        """Remember that the sync of `span` brought `version`."""
        self._links.pop(version, None)
        self._links[version] = Link(span.trace_id, span.span_id, {semconv.WEIGHT_VERSION: version})
        if len(self._links) > KNOWN_SYNCS:
            del self._links[next(iter(self._links))]

    def link(self, span: Span, version: str) -> None:
        """Link a rollout's span to the sync that brought `version`, if this process made that sync."""
        if (link := self._links.get(version)) is not None:
            span.link(link, **link.attributes)

    def link_later(self, span: Span, version: str, completions: Completions) -> None:
        """Link a rollout's span to the syncs that replaced `version` while the rollout was running."""
        versions = {each for completion in completions for each, _, _ in completion.weight_versions or ()} - {version}
        for later in sorted(versions):
            self.link(span, later)


class Frozen(Source):
    """In the place of the trainer's weights: the engine has no trainer, and keeps the weights of its checkpoint."""


@dataclass(slots=True)
class WeightSync:
    """Syncs one engine from one source, and knows the version of the weights that the engine has."""

    engine: Engine
    source: Source
    lifecycle: Lifecycle
    profiling: ProfilingContext
    leading: bool
    """Whether this rank sends the weights, so that it records how many bytes were sent."""
    version: str
    """The version that the last sync brought; before the first sync, the one that the engine started with."""
    history: SyncHistory = field(default_factory=SyncHistory)
    warned: bool = False
    """Whether the log says that syncs are unaudited."""
    count: int = 0
    """Syncs that were asked for so far."""
    synced: int = 0
    """Syncs that succeeded so far."""
    synced_by: int = 0
    """The thread that made the last one."""

    def require_trainer(self, call: str) -> None:
        """Raise `EngineStateError` if the engine is frozen, so that nothing may replace or discard its weights."""
        if isinstance(self.source, Frozen):
            hint = "it was constructed without the trainer's model, and keeps the weights of its own checkpoint"
            raise EngineStateError(call, "frozen", hint)

    def sync(self, version: str | None, verify: Verify | None) -> SyncReport:
        """See `Generation.sync_weights`."""
        self.require_trainer("sync_weights")
        if verify is not None and verify not in (known := self.engine.verifications):
            raise ArgumentError("verify", f"must be one of {', '.join(known)} with this engine, got {shown(verify)}")
        with self.lifecycle.exclusive("sync_weights"):
            self.lifecycle.require_weights_awake("sync_weights")
            self.count += 1
            following = str(int(self.version) + 1) if self.version.isdecimal() else str(self.count)
            return self._sync(following if version is None else version, verify)

    def verify(self, how: HowVerified) -> WeightVerification:
        """See `Generation.verify`."""
        self.require_trainer("verify")
        if how not in (known := [each for each in self.engine.verifications if each != "none"]) and how != "bits":
            raise ArgumentError("how", f"must be one of {', '.join(known)} with this engine, got {shown(how)}")
        lifecycle, version = self.lifecycle, {semconv.WEIGHT_VERSION: self.version}
        with lifecycle.exclusive("verify"):
            lifecycle.states.require("verify", EngineState.AWAKE)
            with lifecycle.watched_span("verify", semconv.VERIFICATION, version) as (span, watched):
                return self.engine.verify(self.source, how, lifecycle.phase_trace(span, watched))

    def sync_if_stale(self) -> None:
        """Sync before a generation if the engine lacks the trainer's weights. Of concurrent generations, one syncs."""
        if not self.lifecycle.weights_stale:
            return
        with self.lifecycle.exclusive_within_generation():
            if self.lifecycle.weights_stale:
                # The generation that had the lock before this one may have failed to sync.
                self.lifecycle.states.require("generate", EngineState.AWAKE)
                self._sync(self.version, None)

    def _sync(self, version: str, verify: Verify | None) -> SyncReport:
        source, profiling, lifecycle, start = self.source, self.profiling, self.lifecycle, time.monotonic()
        attributes = {semconv.WEIGHT_VERSION: version}
        with (
            lifecycle.watched_span("sync_weights", semconv.WEIGHT_SYNC, attributes) as (span, watched),
            lifecycle.syncing(),
        ):
            trace = lifecycle.phase_trace(span, watched)
            self.engine.sync(source, version, trace, verify)
            seconds = time.monotonic() - start
            sent, tensors = (source.bytes, source.tensors) if self.leading else (0, 0)
            verified = trace.attributes.get(semconv.VERIFY)
            audit = trace.attributes.get(semconv.AUDIT)
            audited = None if audit is None else audit == "passed"
            if audited is False and not self.warned:
                self.warned = True
                reason = trace.attributes.get(semconv.AUDIT_REASON)
                logger.warning("vgen: weight syncs are unaudited: a tensor could be dropped without a word: %s", reason)
            report = SyncReport(
                version=version, bytes=sent, tensors=tensors, seconds=seconds, verified=verified, audited=audited
            )
            sizes = {semconv.SYNC_BYTES: report.bytes, semconv.SYNC_TENSORS: report.tensors}
            span.set({**sizes, semconv.SYNC_RATE: report.bandwidth, **record_memory(profiling)})
            self.version, lifecycle.weights_stale = version, False
            self.synced, self.synced_by = self.synced + 1, threading.get_ident()
            self.history.add(span, version)
        if self.leading:
            transport = {semconv.TRANSPORT: span.attributes.get(semconv.TRANSPORT)}
            profiling.record(semconv.SYNCED_BYTES, report.bytes, **transport)
            profiling.record(semconv.SYNC_BANDWIDTH, report.bandwidth, **transport)
        return report


def version_name(version: Any) -> str:
    """A version as completions, spans and servers carry it: text of at most 200 characters. A number becomes text.

    Raises `ArgumentError`.
    """
    rule = "text of 1 to 200 printable characters, or a number"
    if not isinstance(version, str):
        return str(integer("version", version, most=INT63, rule=rule))
    if not 1 <= len(text("version", version, rule)) <= 200 or not version.isprintable():
        raise ArgumentError("version", f"must be {rule}, got {shown(version)}")
    return version
