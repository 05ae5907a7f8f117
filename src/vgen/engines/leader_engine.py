"""The leader's engine, as every trainer rank holds it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from ..distributed.collective_call import CollectiveCall
from ..distributed.leader_ranks import LeaderRanks
from ..engine_protocol import (
    Batch,
    CannotProbe,
    Engine,
    HowVerified,
    PauseMode,
    ProbeLogprobs,
    Source,
    SourceAddresses,
    SyncTrace,
    TensorMetadata,
    Verify,
)
from ..errors import EngineError, VgenError, WeightSyncError
from ..profiling import Span
from ..types import Completion, EngineVerification, SleepReport, WeightVerification

_FACTS = ("kind", "device_type", "max_model_length", "vocabulary_size", "concurrent", "verifications")
_OPTIONAL_FACTS = ("model", "weight_version")


class LeaderEngine:
    """An `Engine` that the leader (rank 0) makes and drives. All ranks make each of its calls together.

    Only the leader calls `stream`: prompts and completions travel through `LeaderRanks.call`. Where the source's
    `collective` is true, all ranks iterate the source together. The leader announces each pass, and finishes it even
    if the receiver leaves early, so that no rank is left waiting in a collective.

    Args:
        ranks: The ranks; all of them construct the `LeaderEngine` together.
        make: Makes the engine. Only the leader calls it; if it raises, all ranks raise.
    """

    def __init__(self, ranks: LeaderRanks, make: Callable[[], Engine]) -> None:
        self._ranks = ranks
        self._engine: Engine | None = None
        try:
            facts = ranks.lead("construction", lambda: self._make(make))
        except BaseException:
            ranks.close()
            raise
        self.kind: str = facts["kind"]
        self.device_type: str = facts["device_type"]
        self.max_model_length: int = facts["max_model_length"]
        self.vocabulary_size: int = facts["vocabulary_size"]
        self.concurrent: bool = facts["concurrent"]
        self.verifications: tuple[Verify, ...] = tuple(facts["verifications"])
        self.model: str | None = facts["model"]
        self.weight_version: str | None = facts["weight_version"]
        """The version that the engine held when it was made; None where it does not tell."""

    def _make(self, make: Callable[[], Engine]) -> dict[str, Any]:
        self._engine = engine = make()
        facts = {name: getattr(engine, name) for name in _FACTS}
        return facts | {name: getattr(engine, name, None) for name in _OPTIONAL_FACTS}

    @property
    def inner(self) -> Engine:
        """The leader's engine. Raises `EngineError` on another rank."""
        if self._engine is None:
            raise EngineError(f"only rank 0 has the engine, and this is rank {self._ranks.index}")
        return self._engine

    def stream(self, batch: Batch) -> Generator[Completion]:
        yield from self.inner.stream(batch)

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        collective = source.collective
        with self._ranks.call("sync_weights") as call:
            call.gather((), {"version": version, "verify": verify})
            if self._engine is not None:
                announced = _AnnouncedSource(source, call, collective=collective)
                call.share(lambda: self._lead_sync(call, announced, version, trace, verify))
            else:
                _follow(call, source)

    def _lead_sync(
        self, call: CollectiveCall, source: _AnnouncedSource, version: str, trace: SyncTrace, verify: Verify | None
    ) -> None:
        try:
            self.inner.sync(source, version, _SignsOfLife(trace, call), verify)
        except Exception as error:
            call.raise_reported()  # another rank's error comes first: this one may be its consequence
            source.finish(error)
            raise

    def verify_deferred(self, trace: SyncTrace) -> None:
        self._ranks.lead("verify_deferred", lambda: self.inner.verify_deferred(trace))

    def verify(self, source: Source, how: HowVerified, trace: SyncTrace) -> WeightVerification:
        collective = source.collective
        with self._ranks.call("verify") as call:
            call.gather((), {"how": how})
            if self._engine is None:
                return _report(_follow(call, source))
            announced = _AnnouncedSource(source, call, collective=collective)
            trace = _SignsOfLife(trace, call)
            return _report(call.share(lambda: asdict(self.inner.verify(announced, how, trace))))

    def sleep(self, level: int) -> SleepReport:
        return SleepReport(**self._ranks.lead("sleep", lambda: asdict(self.inner.sleep(level)), level=level))

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        return SleepReport(**self._ranks.lead("wake_up", lambda: asdict(self.inner.wake_up(tags)), tags=list(tags)))

    def pause(self, mode: PauseMode) -> None:
        self._ranks.lead("pause", lambda: self.inner.pause(mode), mode=mode)

    def resume(self) -> None:
        self._ranks.lead("resume", lambda: self.inner.resume())

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._ranks.close()


def _follow(call: CollectiveCall, source: Source) -> Any:
    """On a rank without the engine: take part in what the leader announces, until it has finished; its result."""
    while (message := call.wait("pass", "probe", "data")[0]).kind != "data":
        try:
            if message.kind == "probe":
                with suppress(CannotProbe):  # whether the model can compute is for the leader to say
                    source.probe_logprobs(message.data["token_ids"], message.data["unit"])
            else:
                for _ in _watched(source, call):
                    pass
        except Exception as error:
            raise call.verdict(error) from error
    return message.data["result"]


def _report(data: dict[str, Any]) -> WeightVerification:
    engines = tuple(EngineVerification(**each) for each in data["engines"])
    return WeightVerification(**{**data, "engines": engines})


class _AnnouncedSource(Source):
    """The leader's source. It announces each pass to the other ranks, and finishes one that its receiver leaves."""

    def __init__(self, source: Source, call: CollectiveCall, *, collective: bool) -> None:
        self._source, self._call, self._collective = source, call, collective
        self._unfinished: Iterator[tuple[str, Any]] | None = None
        self.was_collective = source.was_collective

    @property
    def model(self) -> Any:
        return self._source.model

    def metadata(self) -> TensorMetadata | None:
        return self._source.metadata()

    def address_snapshot(self) -> SourceAddresses | None:
        return self._source.address_snapshot()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._drain()
        if self._collective:
            self._call.tell("pass")
        self._unfinished = _watched(self._source, self._call)
        for item in self._unfinished:  # noqa: UP028  (`yield from` would close it when the receiver leaves)
            yield item
        self._unfinished = None
        self.seconds = self._source.seconds

    def probe_logprobs(self, token_ids: list[int], unit: float = 0.0) -> ProbeLogprobs:
        """What the trainer's model gives for these tokens. Where the model is sharded, all ranks run it."""
        if self._collective:
            self._call.tell("probe", token_ids=token_ids, unit=unit)
        return self._source.probe_logprobs(token_ids, unit)

    def finish(self, error: Exception) -> None:
        """After `error`: finish the pass that the receiver left."""
        try:
            self._drain()
        except VgenError as other:
            error.add_note(f"and the pass over the weights could not be finished for the other ranks: {other}")

    def _drain(self) -> None:
        unfinished, self._unfinished = self._unfinished, None
        if self._collective:
            for _ in unfinished or ():
                pass


def _watched(source: Source, call: CollectiveCall) -> Iterator[tuple[str, Any]]:
    """One pass over the source, which raises soon after another rank's pass has raised."""
    items = iter(source)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except VgenError:
            raise
        except Exception as error:
            raise WeightSyncError(
                f"{type(error).__name__}: {error} (in collectives the trainer's process group has its own timeout)",
                phase="gather",
                receiver=f"rank {call.index}",
            ) from error
        call.check()
        yield item


class _SignsOfLife:
    """A `SyncTrace` that also tells the other ranks of each phase that begins."""

    def __init__(self, trace: SyncTrace, call: CollectiveCall) -> None:
        self._trace, self._call = trace, call

    @contextmanager
    def phase(self, name: str, /) -> Generator[Span]:
        self._call.tell("alive")
        with self._trace.phase(name) as span:
            yield span

    def set(self, attributes: Mapping[str, Any], /) -> None:
        self._trace.set(attributes)
