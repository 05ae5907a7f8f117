"""The leader's engine, as every rank has it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from ..engines.base import Batch, Engine, PauseMode, Source, SyncTrace, Verify
from ..errors import EngineError, VgenError, WeightSyncError
from ..profiling import Span
from ..types import Completion, SleepReport
from .call import DistributedCall
from .distributed import DistributedRanks


class LedEngine:
    """An `Engine` that the leader makes and drives; each of its calls is made by all ranks.

    `stream` alone is the leader's: prompts and completions travel by `Ranks.call`. Where the source's `collective`
    is true, all ranks iterate it together: the leader tells them when a pass begins, and ends it whatever its
    receiver does, so that no rank is left in a collective.

    Args:
        ranks: All of them construct it together.
        make: Makes the engine; called on the leader. What it raises is raised on every rank.
    """

    def __init__(self, ranks: DistributedRanks, make: Callable[[], Engine]) -> None:
        self._ranks = ranks
        self._engine: Engine | None = None
        try:
            facts = self._lead("construction", lambda: self._make(make))
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
        """What the engine held when it was made; None where it does not say."""

    def _make(self, make: Callable[[], Engine]) -> dict[str, Any]:
        self._engine = engine = make()
        return {
            "kind": engine.kind,
            "device_type": engine.device_type,
            "max_model_length": engine.max_model_length,
            "vocabulary_size": engine.vocabulary_size,
            "concurrent": engine.concurrent,
            "verifications": list(engine.verifications),
            "model": getattr(engine, "model", None),
            "weight_version": getattr(engine, "weight_version", None),
        }

    @property
    def inner(self) -> Engine:
        """The leader's engine."""
        if self._engine is None:
            raise EngineError(f"the engine is rank 0's, and this is rank {self._ranks.index}")
        return self._engine

    def stream(self, batch: Batch) -> Generator[Completion]:
        yield from self.inner.stream(batch)

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        collective = getattr(source, "collective", False)
        with self._ranks.call("sync_weights") as call:
            call.gather((), {"version": version, "verify": verify})
            if self._engine is not None:
                passes = _Passes(source, call, told=collective)
                call.share(lambda: self._send(call, passes, version, trace, verify))
                return
            while (message := call.wait("pass", "ask", "data")[0].words)["is"] != "data":
                try:
                    if message["is"] == "ask":
                        _ask_too(source, message["token_ids"])
                    else:
                        for _ in _watched(source, call):
                            pass
                except Exception as error:
                    raise call.verdict(error) from error

    def _send(
        self, call: DistributedCall, source: _Passes, version: str, trace: SyncTrace, verify: Verify | None
    ) -> None:
        try:
            self.inner.sync(source, version, _Signs(trace, call), verify)
        except Exception as error:
            call.heard()  # what another rank has raised comes first: this may be but its consequence
            source.end(error)
            raise

    def verify(self, trace: SyncTrace) -> None:
        self._lead("verify", lambda: self.inner.verify(trace))

    def sleep(self, level: int) -> SleepReport:
        return SleepReport(**self._lead("sleep", lambda: asdict(self.inner.sleep(level)), level=level))

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        return SleepReport(**self._lead("wake_up", lambda: asdict(self.inner.wake_up(tags)), tags=list(tags)))

    def pause(self, mode: PauseMode) -> None:
        self._lead("pause", lambda: self.inner.pause(mode), mode=mode)

    def resume(self) -> None:
        self._lead("resume", lambda: self.inner.resume())

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._ranks.close()

    def _lead(self, name: str, work: Callable[[], Any], **terms: Any) -> Any:
        return self._ranks.lead(name, work, **terms)


class _Passes:
    """The leader's source: other ranks are told of each pass, and one that its receiver leaves is gone on with."""

    bytes: int
    tensors: int
    seconds: float

    def __init__(self, source: Source, call: DistributedCall, *, told: bool) -> None:
        self._source, self._call, self._told = source, call, told
        self._left: Iterator[tuple[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._drain()
        if self._told:
            self._call.tell("pass")
        self._left = _watched(self._source, self._call)
        yield from _kept(self._left)
        self._left = None

    def ask(self, token_ids: list[int]) -> Any:
        """What the trainer's model gives to these tokens; where it is sharded, all ranks run it."""
        if self._told:
            self._call.tell("ask", token_ids=token_ids)
        return self._source.ask(token_ids)  # pyright: ignore[reportAttributeAccessIssue]

    def end(self, error: Exception) -> None:
        """After `error`: go on with the pass that was left."""
        try:
            self._drain()
        except VgenError as other:
            error.add_note(f"and the pass over the weights could not be ended for the other ranks: {other}")

    def _drain(self) -> None:
        left, self._left = self._left, None
        if self._told:
            for _ in left or ():
                pass


def _kept(items: Iterator[Any]) -> Iterator[Any]:
    """`items`, which stay open when whoever iterates this leaves."""
    for item in items:  # noqa: UP028  (`yield from` would close them)
        yield item


def _ask_too(source: Any, token_ids: list[int]) -> None:
    """Take part; whether the model could answer is for the leader to say."""
    from ..weights.probe import CannotProbe

    with suppress(CannotProbe):
        source.ask(token_ids)


def _watched(source: Source, call: DistributedCall) -> Iterator[tuple[str, Any]]:
    """One pass, which ends by an error as soon as another rank's has."""
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


class _Signs:
    """A `SyncTrace` that tells the other ranks of each phase that begins."""

    def __init__(self, trace: SyncTrace, call: DistributedCall) -> None:
        self._trace, self._call = trace, call

    @contextmanager
    def phase(self, name: str, /) -> Generator[Span]:
        self._call.tell("alive")
        with self._trace.phase(name) as span:
            yield span

    def set(self, attributes: Mapping[str, Any], /) -> None:
        self._trace.set(attributes)
