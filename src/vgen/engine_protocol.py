"""What every engine promises, and the states it can be in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from .errors import EngineStateError, PromptError, ServerError
from .profiling import Span, semconv
from .types import Completion, LoRARequest, Sampling, SleepReport, WeightVerification

if TYPE_CHECKING:
    import torch


class EngineState(StrEnum):
    """What an engine is doing.

    `awake ⇄ paused`, and `awake → asleep → waking → awake`. `syncing` can begin from awake, paused, asleep or failed,
    and then returns to the state before (from failed: awake). `closed` is the last state.
    """

    STARTING = "starting"
    """Only inside the constructor: telemetry never shows it."""
    AWAKE = "awake"
    PAUSED = "paused"
    SYNCING = "syncing"
    ASLEEP = "asleep"
    WAKING = "waking"
    FAILED = "failed"
    """The engine broke, or its weights are unknown. A weight sync that succeeds makes it awake again."""
    CLOSED = "closed"


_S = EngineState
_ALWAYS = (_S.STARTING, _S.AWAKE, _S.PAUSED, _S.SYNCING, _S.ASLEEP, _S.WAKING)
_BEFORE: dict[EngineState, tuple[EngineState, ...]] = {
    _S.STARTING: (),
    _S.AWAKE: (_S.STARTING, _S.PAUSED, _S.SYNCING, _S.WAKING),
    _S.PAUSED: (_S.AWAKE, _S.SYNCING),
    _S.SYNCING: (_S.AWAKE, _S.PAUSED, _S.ASLEEP, _S.FAILED),
    _S.ASLEEP: (_S.AWAKE, _S.SYNCING, _S.WAKING),
    _S.WAKING: (_S.ASLEEP,),
    _S.FAILED: _ALWAYS,
    _S.CLOSED: (*_ALWAYS, _S.FAILED),
}
"""The states from which each state may be entered."""


class StateMachine:
    """Holds an engine's state. A transition that is not allowed raises `EngineStateError`. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.on_transition: Callable[[EngineState, EngineState], object] = lambda old, new: None
        """Called after each transition, in the thread that made it."""
        self.state = EngineState.STARTING
        self.detail = ""
        """More about the state, for errors: the sleep level, what failed."""
        self.since_ns = time.monotonic_ns()

    def move(self, call: str, to: EngineState, detail: str = "") -> EngineState:
        """Go to `to` for the call named `call`; returns the state before. Raises `EngineStateError`."""
        with self._changed:
            self.require(call, *_BEFORE[to])
            old = self._set(to, detail)
        self.on_transition(old, to)
        return old

    def _set(self, to: EngineState, detail: str) -> EngineState:
        old, self.state, self.detail, self.since_ns = self.state, to, detail, time.monotonic_ns()
        self._changed.notify_all()
        return old

    def number(self) -> float:
        """The state as a number: its index in `semconv.STATES`."""
        return float(semconv.STATES.index(self.state))

    def age(self) -> float:
        """Seconds since the last transition."""
        return (time.monotonic_ns() - self.since_ns) / 1e9

    def restore(self, to: EngineState, detail: str) -> None:
        """Go back to the state before a call that the engine refused without changing anything."""
        with self._changed:
            old = self._set(to, detail)
        if old is not to:
            self.on_transition(old, to)

    def require(self, call: str, *states: EngineState) -> None:
        """Raise unless the engine is in one of `states`."""
        if self.state not in states:
            raise EngineStateError(call, self.describe(), _HINTS.get(self.state, ""))

    @contextmanager
    def during(self, call: str, through: EngineState, then: EngineState, detail: str = "") -> Iterator[None]:
        """Be in the state `through` in the block and in `then` after it. If the block raises, be `failed`."""
        self.move(call, through)
        try:
            yield
        except BaseException as error:
            self.fail(call, f"{call} raised {type(error).__name__}")
            raise
        self.move(call, then, detail)

    def wait_while(self, state: EngineState, timeout: float) -> None:
        """Wait until the state is not `state`, for at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.state is not state, timeout)

    def fail(self, call: str, detail: str) -> None:
        """Go to `failed`, unless the engine is failed or closed already."""
        with self._changed:  # Several threads may notice the same failure.
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
    """One completion to be sampled.

    An engine copies `rank`, `prompt_index` and `generation_index` into the `Completion`; together they number it.
    """

    prompt_index: int
    """The prompt's place in the list that the caller on that rank passed."""
    generation_index: int
    token_ids: Sequence[int]
    seed: int | None
    images: Sequence[Any] = ()
    """`PIL.Image`s, one for each placeholder in the prompt."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """The trace context (W3C `traceparent`) that becomes the parent of the engine's own span."""
    rank: int = 0
    """Which of the trainer ranks that share the engine asks for it."""

    @property
    def prompt_key(self) -> tuple[int, int]:
        """`(rank, prompt_index)`: the requests of one prompt have the same."""
        return self.rank, self.prompt_index

    @property
    def key(self) -> tuple[int, int, int]:
        """`(rank, prompt_index, generation_index)`: what tells a request of a batch from the others."""
        return self.rank, self.prompt_index, self.generation_index


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
        rank=request.rank,
        prompt_index=request.prompt_index,
        generation_index=request.generation_index,
        token_ids=[],
        finish_reason="error",
        error=error,
    )


def refused_by(request: Request, error: ServerError, limit: int | None = None) -> Completion:
    """`refusal` by a server, in its own words."""
    refused = PromptError(request.prompt_index, f"was refused by {error.url}: {error.server_message or error}", limit)
    refused.__cause__ = error
    return refusal(request, refused)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call asks an engine for."""

    requests: Sequence[Request]
    sampling: Sampling
    lora_request: LoRARequest | None = None
    priority: int = 0
    """Lower values run earlier, if the engine's scheduling policy is `priority`."""
    cancellation: Cancellation = field(default_factory=Cancellation)
    on_progress: Callable[[], object] = lambda: None
    """The engine calls this, from any thread, when new tokens arrived that do not complete a request yet."""


TensorMetadata: TypeAlias = "Sequence[tuple[str, tuple[int, ...], torch.dtype]]"
"""Checkpoint name, shape and dtype of each tensor of one pass over a source, in the order of the pass."""


class PartlyAwake(Exception):
    """Raised by `Engine.wake_up`, which may be called again: these tags are `woken`, the others are asleep."""

    def __init__(self, problem: str, woken: Sequence[str]) -> None:
        super().__init__(problem)
        self.woken = tuple(woken)


class CannotProbe(Exception):
    """Log-probabilities cannot be compared; the message says why. Nothing is known then about the weights."""


@dataclass(frozen=True, slots=True)
class ProbeLogprobs:
    """The log-probabilities that the trainer's model gives to the tokens of a probe."""

    token_ids: list[int]
    logprobs: torch.Tensor
    """In nats, one for each token but the first; float32, on the host."""
    noise: torch.Tensor
    """What rounding errors change in them: float32, on the host, of shape `(passes, tokens - 1)`. See `unit`."""
    unit: float
    """The relative size of those errors: that of the coarser of the two sides' dtypes, such as 2⁻⁹ for bf16."""
    hooks: tuple[str, ...] = ()
    """The forward hooks of the trainer's model that could change its results, as `path: function`."""


class SourceAddresses(Protocol):
    """The memory addresses of a source's tensors, where a pass yields views of the trainer's own memory."""

    tensor_addresses: Any
    """The `TensorAddresses` of all tensors."""

    def in_place(self) -> bool:
        """Whether each tensor still has the address that it had. Cheap: asked before memory there is read."""
        ...

    def unchanged(self) -> bool:
        """Whether the model's structure, shapes and dtypes are as they were. May be asked after the copies started."""
        ...

    def same_as(self, other: Any) -> bool:
        """Whether `other` is a snapshot of the same tensors at the same addresses."""
        ...

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a view of this memory, and not a copy."""
        ...


class Source:
    """The trainer's weights: a stream of `(checkpoint name, full tensor)` that is iterated anew for each sync.

    A subclass defines `__iter__`. The other members have defaults that are right for whole tensors in this process.
    A yielded tensor is valid until the next one is asked for. `vgen.weights.source_of` makes a source of a module, or
    of any re-iterable of named tensors.
    """

    bytes: int = 0
    """Bytes that the last pass yielded."""
    tensors: int = 0
    """Tensors that the last pass yielded."""
    seconds: float = 0.0
    """Seconds that the last pass took to make the tensors, without the receiver's time.

    It is 0 if the receiver read the trainer's memory directly.
    """
    passes: int = 0
    """Passes started so far. Counted only by a source whose passes can be collective."""
    was_collective: bool | None = False
    """`collective` as of the last look at the model; None before the first."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise TypeError(f"{type(self).__name__} must define __iter__")

    @property
    def model(self) -> torch.nn.Module | None:
        """The trainer's module, in all its wrappers; None where there is none."""
        return None

    @property
    def collective(self) -> bool:
        """Whether all trainer ranks must iterate together. Looks at the model again, which takes milliseconds."""
        return bool(self.was_collective)

    def metadata(self) -> TensorMetadata | None:
        """What a pass will yield; None where only a pass can tell. Gathers nothing and needs no other rank."""
        return None

    def ties(self) -> Mapping[str, str]:
        """Names whose tensors are now the same memory in the same layout as an earlier one, and that one's name.

        An engine that keeps one tensor for both reads only one of them. Gathers nothing and needs no other rank.
        """
        return {}

    def drain(self) -> None:
        """Finish the collectives of a pass whose receiver stopped in the middle: other ranks wait in them."""

    def take_part(self) -> None:
        """Take part in one pass without a receiver, for the other ranks' sake."""

    def probe_logprobs(self, token_ids: list[int], unit: float = 0.0) -> ProbeLogprobs:
        """Run the trainer's model on a probe, for an engine with relative rounding errors of `unit`.

        All ranks of a sharded model call it together. Raises `CannotProbe`.
        """
        raise CannotProbe("the source has no model")

    def logprobs(self, token_ids: list[int], temperature: float = 1.0) -> list[float]:
        """The log-probability that the trainer's model gives to each token but the first, in nats.

        All ranks of a sharded model call it together. Raises `CannotProbe`.
        """
        raise CannotProbe("the source has no model")

    def address_snapshot(self) -> SourceAddresses | None:
        """Where the tensors are in memory now; None where a pass makes any of them."""
        return None


class SyncTrace(Protocol):
    """The open span of a weight sync. `with trace.phase("load") as span` opens the child span of that phase."""

    def phase(self, name: str, /) -> AbstractContextManager[Span]: ...

    def set(self, attributes: Mapping[str, Any], /) -> None:
        """Set attributes of the sync's own span: which transport was used and why, how long the engine paused."""


PauseMode: TypeAlias = Literal["abort", "wait", "keep"]
"""What becomes of requests in flight: ended as they are, waited for, or frozen until `resume`."""


BUCKET_BYTES = 256 << 20
"""Default size of each of the two buckets in which weights are sent."""
Transport: TypeAlias = Literal["resident", "shared_memory", "nccl", "gloo", "ipc", "checkpoint"]
"""How servers get weights: from the trainer's memory on the same GPU; through memory that both sides map; by broadcast
with NCCL or gloo; through vLLM's own CUDA IPC engine; or from a folder that they reload. See docs/weight_sync.md."""
InProcess: TypeAlias = Literal["recorded", "reload"]
"""How weights reach an engine in this process: copied by a record of its loader, or by vLLM's own reload."""
Verify: TypeAlias = Literal["bits", "logprobs", "none"]
"""How a sync is verified: bit by bit where both sides can be read, by log-probabilities, or not at all."""
HowVerified: TypeAlias = Literal["bits", "logprobs"]
"""How weights are verified without a sync."""


class Engine(Protocol):
    """Owns weights, a KV cache and a scheduler. Knows neither ranks nor the trainer's model.

    Callers make one call at a time, unless the engine is `concurrent`. The engine does not check its own state:
    `Generation` does.
    """

    kind: str
    device_type: str
    max_model_length: int
    vocabulary_size: int
    verifications: tuple[Verify, ...]
    """The values of `verify` that `sync` supports."""
    concurrent: bool
    """Whether several threads may call `stream` at the same time, and other methods while it runs."""

    def stream(self, batch: Batch) -> Generator[Completion]:
        """Sample all requests, and yield each completion as soon as it is done.

        If the engine refuses a prompt, its completions have the `error`. However the iteration ends, no request is
        left in the engine. Raises `EngineError` if the engine broke, `ValueError` if it refused a parameter.
        """
        ...

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        """Replace all weights, and empty every cache that holds results of the old ones. Raises `WeightSyncError`.

        By default the engine's first weights, and the first ones after a failed sync, are verified end to end. If the
        engine is not awake, it leaves the verification to `verify_deferred`.
        """

    def verify_deferred(self, trace: SyncTrace) -> None:
        """Make the verification that a sync or a sleep left for when the engine is awake, if any.

        Raises `WeightSyncError`.
        """

    def verify(self, source: Source, how: HowVerified, trace: SyncTrace) -> WeightVerification:
        """Compare the weights with the source as it is now, without a sync. The engine is awake.

        Raises `WeightSyncError` in phase `verify` if they differ or cannot be compared. An engine that cannot compare
        bits compares log-probabilities, and the report says why.
        """
        ...

    def pause(self, mode: PauseMode) -> None:
        """Stop scheduling until `resume`. Requests that arrive in the meantime wait."""

    def resume(self) -> None: ...

    def sleep(self, level: int) -> SleepReport: ...

    def wake_up(self, tags: Sequence[str]) -> SleepReport: ...

    def close(self) -> None: ...
