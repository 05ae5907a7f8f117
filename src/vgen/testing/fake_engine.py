"""An engine without a model, for tests of the code around an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from ..engine_protocol import Batch, HowVerified, PauseMode, Request, Source, SyncTrace, Verify
from ..errors import WeightSyncError
from ..profiling import semconv
from ..types import Completion, RequestTiming, Sampling, SleepReport, WeightVerification

if TYPE_CHECKING:
    import torch

SECONDS: dict[str, Any] = dict(
    queue=0.001, prefill=0.001, decode=0.002, time_to_first_token=0.002, time_per_output_token=0.001, e2e=0.004
)
"""The timing of each completion."""


def echo(
    token_ids: Sequence[int], *, max_tokens: int | None = None, seconds: dict[str, Any] = SECONDS, **fields: Any
) -> Completion:
    """The prompt's own tokens as a completion, cut at `max_tokens`, log-probabilities 0.0, with the timing `seconds`.

    `fields` are the other fields of `Completion`.
    """
    now, echoed = time.monotonic_ns(), list(token_ids)[:max_tokens]
    return Completion(
        token_ids=echoed,
        logprobs=[0.0 for _ in echoed],
        finish_reason="length",
        timing=RequestTiming(queued_ns=now - 4_000_000, finished_ns=now, **seconds),
        **fields,
    )


class FakeEngine:
    """An `Engine` that has no model. It records its calls and raises what a test asks it to raise.

    - It answers each request with the prompt's own tokens, cut at `Sampling.max_tokens`, log-probabilities 0.0.
    - `calls` lists the names of the calls: "stream", "pause", "resume", "sleep", "wake_up", "close"; a sync is "load",
      then "reset_cache". `raises["sleep"] = OSError()` makes every later `sleep` raise that error.
    - `weights` holds the tensors of the last sync by name, and `version` their version.
    - `reports["sleep"]` and `reports["wake_up"]` are what those calls return. They start with 1 MiB of device memory.

        engine = FakeEngine()
        generation = Generation(engine, source=[])
        engine.raises["stream"] = EngineError("out of memory")
    """

    kind = "fake"
    device_type = "cpu"
    concurrent = False
    verifications: tuple[Verify, ...] = ("bits", "none")

    def __init__(self, *, max_model_length: int = 64, vocabulary_size: int = 100) -> None:
        self.max_model_length, self.vocabulary_size = max_model_length, vocabulary_size
        self.raises: dict[str, BaseException] = {}
        self.calls: list[str] = []
        report = SleepReport(memory_freed=True, device_bytes=1 << 20)
        self.reports: dict[str, SleepReport] = {"sleep": report, "wake_up": report}
        self.requests: Sequence[Request] = ()
        """The requests of the last batch."""
        self.weights: dict[str, torch.Tensor] = {}
        self.version = "0"

    def stream(self, batch: Batch) -> Generator[Completion]:
        self.requests = batch.requests
        self._call("stream")
        for request in batch.requests:
            if batch.cancellation.cancelled:
                raise asyncio.CancelledError
            yield self._completion(request, batch.sampling)

    def pause(self, mode: PauseMode) -> None:
        self._call("pause")

    def resume(self) -> None:
        self._call("resume")

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        trace.set({semconv.TRANSPORT: "fake"})
        with trace.phase("load"):
            self._call("load")
            self.weights = dict(source)
        with trace.phase("reset_cache"):
            self._call("reset_cache")
        self.version = version

    def verify_deferred(self, trace: SyncTrace) -> None:
        """Do nothing: a fake sync leaves nothing to verify."""

    def verify(self, source: Source, how: HowVerified, trace: SyncTrace) -> WeightVerification:
        with trace.phase("verify"):
            self._call("verify")
            current = dict(source)
        for name, tensor in current.items():
            held = self.weights.get(name)
            if tensor is not held and (held is None or not tensor.equal(held)):
                raise WeightSyncError("it differs from the source", phase="verify", parameter=name, receiver=self.kind)
        return WeightVerification(how="bits", tensors=len(current))

    def sleep(self, level: int) -> SleepReport:
        self._call("sleep")
        return self.reports["sleep"]

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        self._call("wake_up")
        return self.reports["wake_up"]

    def close(self) -> None:
        self._call("close")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.raises:
            raise self.raises[name]

    def _completion(self, request: Request, sampling: Sampling) -> Completion:
        return echo(
            request.token_ids,
            max_tokens=sampling.max_tokens,
            prompt_index=request.prompt_index,
            generation_index=request.generation_index,
            rank=request.rank,
            weight_version=self.version,
            request_id=f"fake-{request.prompt_index}-{request.generation_index}",
        )
