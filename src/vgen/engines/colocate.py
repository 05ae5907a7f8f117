"""vLLM in the trainer's own process."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import EngineError, MissingExtraError, WeightSyncError
from ..profiling import names
from ..types import Completion, RequestTiming, Sampling, SleepReport
from ..weights.proven import constants_of
from ..weights.recorded import RecordedCopy
from ..weights.source import one_pass
from ..weights.verified import Deferred, verified
from .adapters import Adapters
from .admission import Admission
from .base import Batch, InProcess, PauseMode, Request, Source, SyncTrace, Verify
from .logprobs import number
from .memory import Reading, slept, woken
from .preserve import Randomness, process_group, unchanged_process
from .timing import times_of, timing
from .together import Together

CPU_KV_CACHE_BYTES = 1 << 30
"""On a CPU vLLM would otherwise take `gpu_memory_utilization` of the machine's memory for the KV cache."""

LOOK_SECONDS = 0.1
"""Between two looks at whether the scheduler has computed anything."""


class ColocateEngine:
    """An `Engine` around `vllm.LLM`, without a process of its own.

    `model` is a directory or hub name that vLLM loads. The process is as before once the constructor has
    returned: random states, environment, threads, default process group.
    """

    kind = "colocate"
    concurrent = False
    verifications: tuple[Verify, ...] = ("bits", "logprobs", "none")

    def __init__(
        self,
        model: str,
        *,
        weight_version: str = "0",
        weight_transport: InProcess | None = None,
        **vllm_kwargs: Any,
    ) -> None:
        try:
            with unchanged_process():
                # The engine core must live in this process, or the trainer's tensors could not be handed to it.
                os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
                from vllm import LLM
                from vllm.platforms import current_platform

                self.device_type: str = current_platform.device_type
                kwargs = _defaults(self.device_type) | vllm_kwargs
                self.sleep_mode = bool(kwargs.pop("enable_sleep_mode", False))
                if self.device_type != "cpu":
                    kwargs["enable_sleep_mode"] = self.sleep_mode
                elif str(kwargs.get("dtype")).endswith("bfloat16"):
                    # Without it the first bf16 matrix product ends the process with an illegal instruction.
                    torch.cpu._init_amx()  # pyright: ignore[reportPrivateUsage]
                self._eager = self.device_type == "cpu" and bool(kwargs["enforce_eager"])
                with process_group.joined(), self._at_work():
                    self._llm = LLM(model=model, **kwargs)
                self._randomness = Randomness()  # as the engine's seed has left it
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "vllm":
                raise
            raise MissingExtraError("ColocateGeneration", "vLLM", "vllm' or, without a GPU, 'vgen[cpu") from error
        except Exception as error:
            raise EngineError(f"vLLM could not start {model!r}: {type(error).__name__}: {error}") from error
        self._engine = self._llm.llm_engine
        config = self._engine.model_config
        self.max_model_length: int = config.max_model_len
        self.vocabulary_size: int = config.get_vocab_size()
        self.dtype, self.quantization = str(config.dtype).removeprefix("torch."), config.quantization
        self._awake, self._verified, self._slept = True, False, False
        self._deferred: Deferred | None = None
        self._together = Together(alone=True)
        """The ranks of the last sync."""
        self._adapters, self._admission = Adapters(self._llm), Admission(self._engine)
        with self._at_work():
            (constants,) = self._llm.collective_rpc(lambda worker: constants_of(worker.model_runner.get_model()))
        self._weights = RecordedCopy(receiver=self.kind, transport=weight_transport, constants=constants)
        self._engine.set_weight_version(weight_version)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with process_group.installed():
            if not self._eager:
                yield
                return
            # vLLM compiles its sampler even when told to run eagerly: seconds at the first generation, and a failure
            # on a machine without a C++ compiler.
            with torch.compiler.set_stance("force_eager"):
                yield

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`, for what vgen does not cover."""
        return self._llm

    def stream(self, batch: Batch) -> Generator[Completion]:
        """Yield each completion as it is done. The scheduler stands still while the caller has one in hand."""
        waiting: dict[str, Request] = {}
        try:
            with self._at_work():
                refused = self._admission.admit(batch, self._adapters.load(batch.lora_request), waiting)
            yield from refused
            while waiting:
                for output in self._next_finished(batch):
                    yield _completion(waiting.pop(output.request_id), output, batch.sampling)
        finally:
            if waiting:
                with self._at_work():
                    self._engine.abort_request(list(waiting))

    def _next_finished(self, batch: Batch) -> list[Any]:
        """Run the scheduler until a request is done; returns the outputs of those that are."""
        looked, computed = time.monotonic(), self._computed()
        with self._at_work(), self._randomness.installed():
            while True:
                if batch.cancellation.cancelled:
                    raise asyncio.CancelledError
                try:
                    outputs = self._engine.step()
                except Exception as error:
                    raise EngineError(f"vLLM failed in a scheduler step: {type(error).__name__}") from error
                if finished := [output for output in outputs if output.finished]:
                    return finished
                if time.monotonic() - looked > LOOK_SECONDS:
                    before, looked, computed = computed, time.monotonic(), self._computed()
                    if computed != before or computed is None:
                        batch.moved()

    def _computed(self) -> int | None:
        """How many tokens the scheduler's requests have come to: a step without any is no progress."""
        core: Any = self._engine.engine_core
        try:
            requests = core.engine_core.scheduler.requests
            return sum(request.num_computed_tokens for request in requests.values())
        except AttributeError:  # another vLLM's
            return None

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        """Copy the weights by a record of the loader, or run vLLM's own reload; then reset the caches.

        Nothing is in flight meanwhile. Where bits cannot be compared, because the engine has repacked its weights,
        log-probabilities are. Ranks that gather a sharded model together, or share the engine, fail together.
        """
        weights, bits, before = self._weights, verify == "bits", self._verified
        together = self._together = Together(alone=not self._shared(source))
        first = verify is None and together.any(not before)
        self._verified, self._deferred = False, None  # until this sync has succeeded
        try:
            with together.one_fate("load"), trace.phase("load") as span, one_pass(source):
                self._load(source, bits)
                span.set({names.GATHER_SECONDS: source.seconds})
        finally:
            trace.set(
                {
                    names.TRANSPORT: "recorded" if weights.trusted else "reload",
                    names.TRANSPORT_REASON: weights.reason or "in process",
                    names.PLAN_MODULES: weights.modules,
                    names.PLAN_RELOADED: 0 if weights.trusted else weights.modules,
                    names.PLAN_WAY: weights.way,
                    names.VERIFY: "bits" if bits and weights.trusted else None,
                }
            )
        with together.one_fate("reset_cache"), trace.phase("reset_cache"):
            self._reset_caches()
            self._engine.set_weight_version(version)
        if first or verify == "logprobs" or (bits and together.any(not weights.trusted)):
            with together.one_fate("verify"):
                self._deferred = verified([self], source, trace, awake=self._awake, asked=not first)
        self._verified = self._deferred is None and (before or first or verify in ("bits", "logprobs"))

    def verify(self, trace: SyncTrace) -> None:
        """Compare log-probabilities, where a sync came while the engine was asleep."""
        if self._awake and self._deferred is not None:
            deferred, self._deferred = self._deferred, None
            with self._together.one_fate("verify"):
                deferred.compare(trace)
            self._verified = True

    def _shared(self, source: Source) -> bool:
        """Whether ranks can only sync at once: they gather a sharded model, or are the workers of one engine."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return False
        collective = getattr(source, "was_collective", None)
        if collective is None:
            collective = getattr(source, "collective", False)
        return bool(collective) or self._engine.vllm_config.parallel_config.world_size > 1

    def _load(self, source: Source, verify: bool) -> None:
        def load(worker: Any) -> tuple[str, ...]:
            from vllm.config import set_current_vllm_config

            with set_current_vllm_config(worker.vllm_config):
                return self._weights.load(worker.model_runner, source, verify=verify)

        with self._at_work():
            try:
                (missing,) = self._llm.collective_rpc(load)
            except WeightSyncError:
                raise
            except Exception as error:
                raise WeightSyncError(f"{type(error).__name__}: {error}", phase="load", receiver=self.kind) from error
        if missing:
            raise WeightSyncError(
                f"the trainer's model does not provide it ({len(missing)} such)",
                phase="load",
                parameter=missing[0],
                receiver=self.kind,
            )

    def _reset_caches(self) -> None:
        """Empty the prefix, multimodal and encoder caches: a warm prompt would be answered from the old weights."""
        with self._at_work():
            if not self._llm.reset_prefix_cache():
                raise WeightSyncError("the prefix cache could not be reset", phase="reset_cache", receiver=self.kind)
            self._engine.reset_mm_cache()
            self._engine.reset_encoder_cache()

    def pause(self, mode: PauseMode) -> None:
        """Nothing runs between two calls, so there is nothing to stop; the state keeps new calls away."""

    def resume(self) -> None:
        """See `pause`."""

    def sleep(self, level: int) -> SleepReport:
        """Give device memory back; on a CPU, where vLLM cannot, stop scheduling."""
        self._awake = False
        with self._at_work():
            if self.device_type == "cpu":
                self._llm.reset_prefix_cache()  # as it would be on a GPU: sleeping discards the KV cache
                self._llm.sleep(level=0)
                return SleepReport(memory_freed=False)
            before = Reading.now()
            self._llm.sleep(level=level)
            if level == 2:
                self._discarded()
            return slept(before, Reading.now())

    def _discarded(self) -> None:
        """The weights are gone. The first time, what brings them back is verified: something else may be gone, too."""
        self._weights.forget()
        if not self._slept:
            self._slept, self._verified = True, False

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        """Take the memory of `tags` again."""
        self._awake = self._awake or "kv_cache" in tags
        with self._at_work():
            if self.device_type == "cpu":
                if "kv_cache" in tags:
                    self._llm.wake_up(tags=["scheduling"])
                return SleepReport(memory_freed=False)
            readings = [Reading.now()]
            for tag in tags:  # one by one, so that it is known what each has taken
                self._llm.wake_up(tags=[tag])
                readings.append(Reading.now())
            return woken(readings, tags)

    def close(self) -> None:
        """Shut the engine core down and let go of its memory."""
        engine = self._engine
        self._weights = RecordedCopy()
        process_group.shut_down(engine.engine_core)
        del engine, self._llm, self._engine, self._adapters, self._admission
        gc.collect()
        if self.device_type != "cpu":
            torch.accelerator.empty_cache()


def _defaults(device_type: str) -> dict[str, Any]:
    ranks = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    defaults: dict[str, Any] = {
        # external_launcher makes the trainer's ranks the workers; it needs their process group
        "distributed_executor_backend": "external_launcher" if ranks else "uni",
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": False,  # without them a request has no timing
        "max_num_batched_tokens": 4096,  # vLLM's memory profile overestimates with its own default of 32768
    }
    if device_type == "cpu":
        defaults |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enforce_eager": True}
    return defaults


def _completion(request: Request, output: Any, sampling: Sampling) -> Completion:
    result = output.outputs[0]
    token_ids = list(result.token_ids)
    versions = [(span.version, span.start, span.end) for span in result.weight_versions or ()] or None
    logprobs, top = None, None
    if result.logprobs is not None:
        logprobs = [number(at[token].logprob) for at, token in zip(result.logprobs, token_ids, strict=True)]
        if sampling.logprobs:
            top = [
                [(token, number(found.logprob)) for token, found in sorted(at.items(), key=lambda item: item[1].rank)]
                for at in result.logprobs
            ]
    return Completion(
        prompt_index=request.prompt_index,
        generation_index=request.generation_index,
        token_ids=token_ids,
        logprobs=logprobs,
        top_logprobs=top,
        prompt_logprobs=_prompt_logprobs(output),
        finish_reason=result.finish_reason,
        weight_version=versions[-1][0] if versions else None,
        weight_versions=versions,
        request_id=output.request_id,
        timing=_timing(output.metrics, output.num_cached_tokens or 0),
    )


def _prompt_logprobs(output: Any) -> list[float | None] | None:
    if output.prompt_logprobs is None:
        return None
    pairs = zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
    return [None if at is None else number(at[token].logprob) for at, token in pairs]


def _timing(stats: Any, cached_tokens: int) -> RequestTiming | None:
    times = times_of(stats)
    if times is None:
        return None
    tokens, preemptions = stats.num_generation_tokens, stats.num_preemptions
    return timing(times, tokens=tokens, preemptions=preemptions, cached_tokens=cached_tokens)
