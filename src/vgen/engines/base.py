"""What every engine promises, and the states it can be in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from ..errors import EngineStateError, PromptError, ServerError
from ..profiling import Span, names
from ..types import Completion, LoRARequest, Sampling, SleepReport

if TYPE_CHECKING:
    import torch


class EngineState(StrEnum):
    """What an engine is doing: `starting → awake ⇄ paused ⇄ syncing`, `awake ⇄ asleep`, and the rest."""

    STARTING = "starting"
    AWAKE = "awake"
    PAUSED = "paused"
    SYNCING = "syncing"
    ASLEEP = "asleep"
    WAKING = "waking"
    FAILED = "failed"
    """Its weights are unknown, or it broke: a full sync may bring it back."""
    CLOSED = "closed"


_S = EngineState
_ALLOWED: dict[EngineState, frozenset[EngineState]] = {
    _S.STARTING: frozenset({_S.AWAKE, _S.FAILED, _S.CLOSED}),
    _S.AWAKE: frozenset({_S.PAUSED, _S.SYNCING, _S.ASLEEP, _S.FAILED, _S.CLOSED}),
    _S.PAUSED: frozenset({_S.AWAKE, _S.SYNCING, _S.FAILED, _S.CLOSED}),
    _S.SYNCING: frozenset({_S.AWAKE, _S.PAUSED, _S.ASLEEP, _S.FAILED, _S.CLOSED}),
    _S.ASLEEP: frozenset({_S.WAKING, _S.SYNCING, _S.FAILED, _S.CLOSED}),
    _S.WAKING: frozenset({_S.AWAKE, _S.ASLEEP, _S.FAILED, _S.CLOSED}),
    _S.FAILED: frozenset({_S.SYNCING, _S.CLOSED}),
    _S.CLOSED: frozenset(),
}


class StateMachine:
    """The one place where an engine's state changes. A transition that makes no sense raises `EngineStateError`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.moved: Callable[[EngineState, EngineState], object] = lambda was, now: None
        """Told of each transition, by the thread that has made it."""
        self.state = EngineState.STARTING
        self.detail = ""
        """More about the state, for errors: the sleep level, what failed."""
        self.since_ns = time.monotonic_ns()

    def move(self, call: str, to: EngineState, detail: str = "") -> EngineState:
        """Go to `to`; returns the state left."""
        with self._changed:
            was = self.state
            if to not in _ALLOWED[was]:
                raise EngineStateError(call, self.describe(), _HINTS.get(was, ""))
            self.state, self.detail, self.since_ns = to, detail, time.monotonic_ns()
            self._changed.notify_all()
        self.moved(was, to)
        return was

    def number(self) -> float:
        """The state's place among all, as `names.STATES` has them."""
        return float(names.STATES.index(self.state))

    def age(self) -> float:
        """Seconds for which it has been that."""
        return (time.monotonic_ns() - self.since_ns) / 1e9

    def back(self, to: EngineState, detail: str) -> None:
        """Be what a call has found: it was refused, and has changed nothing."""
        with self._changed:
            was = self.state
            self.state, self.detail, self.since_ns = to, detail, time.monotonic_ns()
            self._changed.notify_all()
        if was is not to:
            self.moved(was, to)

    def require(self, call: str, *states: EngineState) -> None:
        """Raise unless the engine is in one of `states`."""
        if self.state not in states:
            raise EngineStateError(call, self.describe(), _HINTS.get(self.state, ""))

    @contextmanager
    def during(self, call: str, through: EngineState, then: EngineState, detail: str = "") -> Iterator[None]:
        """Be in `through` within the block and in `then` after it; `failed` when it raises anything at all."""
        self.move(call, through)
        try:
            yield
        except BaseException as error:
            self.fail(call, f"{call} raised {type(error).__name__}")
            raise
        self.move(call, then, detail)

    def wait_while(self, state: EngineState, timeout: float) -> None:
        """Wait, for at most `timeout` seconds, until the state is another."""
        with self._changed:
            self._changed.wait_for(lambda: self.state is not state, timeout)

    def fail(self, call: str, detail: str) -> None:
        """Be `failed`, unless already so or closed: several threads may find out at once."""
        with self._changed:
            if self.state not in (EngineState.FAILED, EngineState.CLOSED):
                self.move(call, EngineState.FAILED, detail)

    def describe(self) -> str:
        """The state with its detail: `asleep (level 2)`."""
        return f"{self.state} ({self.detail})" if self.detail else str(self.state)


_HINTS = {
    _S.ASLEEP: "call wake_up() first",
    _S.PAUSED: "call resume() first",
    _S.FAILED: "a full sync_weights() that succeeds brings it back",
    _S.SYNCING: "a weight sync is under way",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to be sampled."""

    prompt_index: int
    generation_index: int
    token_ids: Sequence[int]
    seed: int | None
    images: Sequence[Any] = ()
    """`PIL.Image`s, one for each placeholder in the prompt."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """The trace context (W3C `traceparent`) that the engine's own span lies beneath."""


class Cancellation:
    """How whoever waits for a batch gives it up, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Callable[[], object]] = []
        self.cancelled = False

    def cancel(self) -> None:
        """The engine stops working on the batch; its `stream` ends with `asyncio.CancelledError`."""
        with self._lock:
            self.cancelled, calls = True, tuple(self._calls)
        for call in calls:
            call()

    def then(self, call: Callable[[], object]) -> None:
        """Have `call` called when it happens, or now if it has."""
        with self._lock:
            self._calls.append(call)
            cancelled = self.cancelled
        if cancelled:
            call()


def refusal(request: Request, error: PromptError) -> Completion:
    """What takes the place of a completion whose prompt the engine did not take."""
    return Completion(
        prompt_index=request.prompt_index,
        generation_index=request.generation_index,
        token_ids=[],
        finish_reason="error",
        error=error,
    )


def refused_by(request: Request, error: ServerError, limit: int | None = None) -> Completion:
    """`refusal` by a server, in its own words."""
    refused = PromptError(request.prompt_index, f"was refused by {error.url}: {error.said or error}", limit)
    refused.__cause__ = error
    return refusal(request, refused)


@dataclass(frozen=True, slots=True)
class Batch:
    """What an engine is asked for in one call."""

    requests: Sequence[Request]
    sampling: Sampling
    lora_request: LoRARequest | None = None
    priority: int = 0
    """Lower is earlier, where the engine's scheduling policy is `priority`."""
    cancellation: Cancellation = field(default_factory=Cancellation)
    moved: Callable[[], object] = lambda: None
    """To be called, by any thread, when tokens have come that are no whole completion yet."""


class Source(Protocol):
    """The trainer's weights as a stream of checkpoint names and full tensors that can be run again."""

    bytes: int
    """Sent in the last pass, with `tensors`."""
    tensors: int
    seconds: float
    """Spent in the last pass on getting the tensors, apart from what their receiver did with them."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class SyncTrace(Protocol):
    """The open span of a sync: `with trace.phase("load") as span` opens one beneath it, by its last word."""

    def phase(self, name: str, /) -> AbstractContextManager[Span]: ...

    def set(self, attributes: Mapping[str, Any], /) -> None:
        """Attributes of the sync's own span: which transport was taken and why, how long the engine was paused."""
        ...


PauseMode: TypeAlias = Literal["abort", "wait", "keep"]
"""What becomes of requests in flight: ended as they are, waited for, or frozen until `resume`."""


BUCKET_BYTES = 256 << 20
"""Of each of the two buckets that weights travel in, unless told otherwise."""
Transport: TypeAlias = Literal["resident", "shared_memory", "nccl", "gloo", "ipc", "checkpoint"]
"""How servers get weights: where they lie, on the trainer's own GPU; through memory that both sides map; by broadcast;
through vLLM's own CUDA IPC; or as a folder that they load."""
InProcess: TypeAlias = Literal["recorded", "reload"]
"""How weights reach an engine in this process: copied by a record of its loader, or by vLLM's own reload."""
Verify: TypeAlias = Literal["bits", "logprobs", "none"]
"""How a sync is verified: every bit where both sides can be read, by log-probabilities, or not at all."""


class Engine(Protocol):
    """Owns weights, a KV cache and a scheduler. Knows nothing of ranks or a trainer's model.

    One call at a time, unless it is `concurrent`; the state is checked by whoever composes it.
    """

    kind: str
    device_type: str
    max_model_length: int
    vocabulary_size: int
    verifications: tuple[Verify, ...]
    """Those that `sync` can be asked for."""
    concurrent: bool
    """Whether `stream` may be called by several threads at once, and any other method meanwhile."""

    def stream(self, batch: Batch) -> Generator[Completion]:
        """Sample all requests, yielding each completion as it is done; one whose prompt is refused with its `error`.

        However the iteration ends, nothing stays behind in the engine. `EngineError` means that it broke,
        `ValueError` that it refused a parameter.
        """
        ...

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        """Replace all weights and empty every cache of what the old ones computed. Raises `WeightSyncError`.

        Unless told otherwise by `verify`, an engine's first weights, and the first after a sync that failed, are
        verified end to end; of an engine that is not awake that is left to `verify`.
        """
        ...

    def verify(self, trace: SyncTrace) -> None:
        """Verify what a sync has left for when the engine is awake, if anything. Raises `WeightSyncError`."""
        ...

    def pause(self, mode: PauseMode) -> None:
        """Stop scheduling. A request that comes meanwhile waits."""
        ...

    def resume(self) -> None: ...

    def sleep(self, level: int) -> SleepReport: ...

    def wake_up(self, tags: Sequence[str]) -> SleepReport: ...

    def close(self) -> None: ...
