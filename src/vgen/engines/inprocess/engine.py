"""`ColocateEngine`: vLLM in the trainer's own process."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...distributed.rank_consensus import RankGroup, fail_together
from ...engine_protocol import (
    Batch,
    HowVerified,
    InProcess,
    PartlyAwake,
    PauseMode,
    Request,
    Source,
    SyncTrace,
    Verify,
)
from ...errors import EngineError, MissingExtraError, WeightSyncError
from ...profiling import semconv
from ...types import Completion, SleepReport, WeightVerification
from ...weights.load.record_check import require_equal
from ...weights.load.recorded_copy import RecordedCopy
from ...weights.load.unloaded_tensors import UnloadedTensors
from ...weights.source.module_source import one_pass
from ...weights.verification.verification_phase import Verifier
from ..audit_report import audit_attributes
from ..cpu_seeds import keep_seeds
from ..memory import MemoryReading, sleep_report, wake_report
from ..vllm_outputs import completion_of
from .adapter_loading import AdapterLoader
from .class_guard import unchanged_classes
from .cpu_shared_memory import names_for
from .initial_checkpoint import DUMMY_TARGET
from .process_state_guard import EngineRandomState, process_group, unchanged_process, without_cudnn_attention
from .prompt_admission import PromptAdmission

logger = logging.getLogger(__name__)

CPU_KV_CACHE_BYTES = 1 << 30
"""On a CPU vLLM's default for the KV cache is `gpu_memory_utilization` of the machine's memory."""
NEWER_RUNNER = "vllm.v1.worker.gpu."
"""Where vLLM's second model runner is defined, its default on CUDA devices."""
DRAFT = "draft.*"
"""The draft model's weights: no sync brings them back after a level-2 sleep, so vLLM keeps them in host memory."""
PROGRESS_SECONDS = 0.1
"""How often `stream` checks whether the scheduler has computed tokens."""


class ColocateEngine:
    """An `Engine` around `vllm.LLM` that runs in this process.

    The constructor restores what vLLM changes in the process: random states, environment variables, threads, and
    torch's default process group.

    Args:
        model: A directory or hub name that vLLM loads.
        weight_version: The version of the weights that the engine starts with.
        weight_transport: `recorded` copies weights by a record of vLLM's loader, `reload` runs vLLM's own reload; by
            default `recorded` where it is known to be safe.
        protected: A model whose classes stay as they are, although vLLM may build its own from them.
        vllm_kwargs: Passed on to `vllm.LLM`.

    Raises:
        EngineError: vLLM could not start, or changed a class of the protected model.
        MissingExtraError: vLLM is not installed.
    """

    kind = "colocate"
    concurrent = False
    verifications: tuple[Verify, ...] = ("bits", "logprobs", "none")

    def __init__(
        self,
        model: str,
        *,
        ranks: Callable[[], RankGroup] = lambda: RankGroup(alone=True),
        weight_version: str = "0",
        weight_transport: InProcess | None = None,
        protected: torch.nn.Module | None = None,
        **vllm_kwargs: Any,
    ) -> None:
        self._alone, self._ranks = RankGroup(alone=True), ranks
        try:
            with unchanged_process():
                # The engine core must run in this process, because a sync hands it the trainer's tensors.
                os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
                from vllm import LLM
                from vllm.platforms import current_platform

                if vllm_kwargs.get("load_format") == DUMMY_TARGET:
                    from . import draft_loader  # registers that load format  # noqa: F401

                self.device_type: str = current_platform.device_type
                kwargs = _defaults(self.device_type, ranks().size) | vllm_kwargs
                if kwargs.get("speculative_config"):
                    kwargs.setdefault("sleep_preserve_parameter_names", [DRAFT])
                self.sleep_mode = bool(kwargs.pop("enable_sleep_mode", False))
                if self.device_type != "cpu":
                    kwargs["enable_sleep_mode"] = self.sleep_mode
                elif str(kwargs.get("dtype", "auto")).endswith(("bfloat16", "auto")):
                    # Otherwise the first bf16 matrix product ends the process with an illegal instruction.
                    torch.cpu._init_amx()  # pyright: ignore[reportPrivateUsage]
                if self.device_type == "cpu" and kwargs.get("speculative_config"):
                    logger.warning("vLLM's speculative decoding on a CPU samples wrong tokens at temperatures above 0")
                self._eager = self.device_type == "cpu" and bool(kwargs["enforce_eager"])
                modules = () if protected is None else protected.modules()
                names = names_for(self.device_type, int(kwargs.get("tensor_parallel_size", 1)), ranks)
                with process_group.joined(), self._vllm_context(), unchanged_classes(modules), names:
                    self._llm = LLM(model=model, **kwargs)
                self._random_state = EngineRandomState()  # set by the engine's seed, before it is restored
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "vllm":
                raise
            raise MissingExtraError("ColocateGeneration", "vLLM", "vllm' or, without a GPU, 'vgen[cpu") from error
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM could not start {model!r}: {type(error).__name__}: {error}") from error
        self._engine = self._llm.llm_engine
        config = self._engine.model_config
        self.max_model_length: int = config.max_model_len
        self.vocabulary_size: int = config.get_vocab_size()
        self.dtype, self.quantization = str(config.dtype).removeprefix("torch."), config.quantization
        if (cache_dtype := str(self._engine.vllm_config.cache_config.cache_dtype)).startswith("fp8"):
            self.quantization = self.quantization or f"{cache_dtype} KV cache"
        self._awake, self._verified, self._verifier = True, False, Verifier()
        self._slept = set[int]()
        """The levels of the sleeps so far."""
        self._sync_ranks = self._alone
        """The ranks that made the last sync together."""
        with self._vllm_context():
            (runner,) = self._llm.collective_rpc(lambda worker: worker.model_runner)
            if self.device_type == "cpu":
                keep_seeds(runner)
            (outside,) = self._llm.collective_rpc(
                lambda worker: UnloadedTensors.outside_registries(worker.model_runner.get_model())
            )
        # vLLM's newer runner seeds requests without a seed from NumPy's global generator, which is the trainer's.
        seeds = random.Random(kwargs.get("seed", 0)) if type(runner).__module__.startswith(NEWER_RUNNER) else None
        self._adapters, self._admission = AdapterLoader(self._llm), PromptAdmission(self._engine, seeds)
        self._weights = RecordedCopy(receiver=self.kind, transport=weight_transport, outside=outside)
        self._engine.set_weight_version(weight_version)

    @contextmanager
    def _vllm_context(self) -> Iterator[None]:
        """Surrounds every call of vLLM: its process group is torch's default one within the block."""
        with process_group.installed(), without_cudnn_attention():
            if not self._eager:
                yield
                return
            # vLLM compiles its sampler even if it runs eagerly. That takes seconds at the first generation, and fails
            # on a machine without a C++ compiler.
            with torch.compiler.set_stance("force_eager"):
                yield

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`, for calls that vgen does not offer."""
        return self._llm

    def stream(self, batch: Batch) -> Generator[Completion]:
        """Yield each completion when it is done. The scheduler does not run while the caller handles a completion."""
        waiting: dict[str, Request] = {}
        try:
            with self._vllm_context():
                refusals = self._admission.admit(batch, self._adapters.load(batch.lora_request), waiting)
            yield from refusals
            while waiting:
                for output in self._next_finished(batch):
                    yield completion_of(waiting.pop(output.request_id), output, top=bool(batch.sampling.logprobs))
        finally:
            if waiting:
                with self._vllm_context():
                    self._engine.abort_request(list(waiting))

    def _next_finished(self, batch: Batch) -> list[Any]:
        """Run the scheduler until at least one request is done, and return the outputs of those that are."""
        checked, computed = time.monotonic(), self._computed_tokens()
        with self._vllm_context(), self._random_state.installed():
            while True:
                if batch.cancellation.cancelled:
                    raise asyncio.CancelledError
                try:
                    outputs = self._engine.step()
                except Exception as error:
                    raise EngineError(f"vLLM failed in a scheduler step: {type(error).__name__}") from error
                if finished := [output for output in outputs if output.finished]:
                    return finished
                if time.monotonic() - checked > PROGRESS_SECONDS:
                    before, checked, computed = computed, time.monotonic(), self._computed_tokens()
                    if computed != before or computed is None:
                        batch.on_progress()

    def _computed_tokens(self) -> int | None:
        """Tokens that the running requests have computed; None if this vLLM does not tell.

        A scheduler step can compute nothing, so that steps alone do not show progress.
        """
        core: Any = self._engine.engine_core
        try:
            requests = core.engine_core.scheduler.requests
            return sum(request.num_computed_tokens for request in requests.values())
        except AttributeError:  # another version of vLLM
            return None

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        """Load the weights by a record of vLLM's loader or by vLLM's own reload, reset the caches, verify if due.

        The caller makes sure that no request is in flight. With `verify="bits"` an engine that cannot compare bits,
        because it has repacked its weights, is verified by log-probabilities. If ranks gather a sharded model or share
        the engine, an error on one rank raises on all of them.
        """
        weights, bits, before = self._weights, verify == "bits", self._verified
        together = self._sync_ranks = self._shared(source)
        self._verified = False  # until this sync has succeeded
        self._verifier.new_weights()
        try:
            with fail_together(together, phase="load"), trace.phase("load") as span, one_pass(source):
                self._load(source, bits)
                span.set({semconv.GATHER_SECONDS: source.seconds})
        finally:
            trace.set(
                {
                    semconv.TRANSPORT: "recorded" if weights.recorded else "reload",
                    semconv.TRANSPORT_REASON: weights.reason or "in process",
                    semconv.PLAN_MODULES: weights.modules,
                    semconv.PLAN_RELOADED: 0 if weights.recorded else weights.modules,
                    semconv.PLAN_WAY: weights.way,
                    **audit_attributes([weights.audit.report()]),
                    semconv.VERIFY: "bits" if bits and weights.recorded else None,
                }
            )
        with fail_together(together, phase="reset_cache"), trace.phase("reset_cache"):
            self._reset_caches()
            self._engine.set_weight_version(version)
        # Looks at the hooks now, while the device copies.
        due = verify is None and together.any(not before or self._verifier.has_new_hooks(source))
        if due or verify == "logprobs" or (bits and together.any(not weights.recorded)):
            with fail_together(together, phase="verify"):
                self._verified = self._verifier.verify_sync([self], source, trace, awake=self._awake, asked=not due)
        else:
            self._verified = before or bits

    def verify_deferred(self, trace: SyncTrace) -> None:
        """Compare log-probabilities, if a weight sync or a sleep left that for when the engine is awake."""
        if self._awake and self._verifier.deferred:
            with fail_together(self._sync_ranks, phase="verify"):
                self._verified = bool(self._verifier.resume(trace))

    def verify(self, source: Source, how: HowVerified, trace: SyncTrace) -> WeightVerification:
        """Compare with the source as it is now: by the record of the loader, or by log-probabilities."""
        together, weights = self._shared(source), self._weights
        by_bits = how == "bits" and not together.any(weights.comparable is None)
        with fail_together(together, phase="verify"):
            if by_bits and (record := weights.comparable) is not None:
                with trace.phase("verify") as span, one_pass(source):
                    tensors = require_equal(record, source, self.kind)
                    span.set({semconv.VERIFY: "bits"})
                report = WeightVerification(how="bits", tensors=tensors)
            else:
                reason = (weights.reason or "the weights were not loaded by a record") if how == "bits" else ""
                report = self._verifier.verify_now([self], source, trace, reason=reason)
        trace.set({semconv.VERIFY: report.how})
        self._verified = True
        return report

    def _shared(self, source: Source) -> RankGroup:
        """The ranks that must sync together: those that gather a sharded model, or are the workers of one engine.

        Asks at each sync, because a trainer may initialize torch.distributed after it has made its engine.
        """
        ranks = self._ranks()
        if ranks.size == 1:
            return self._alone
        collective = source.collective if source.was_collective is None else source.was_collective
        return ranks if collective or self._engine.vllm_config.parallel_config.world_size > 1 else self._alone

    def _load(self, source: Source, verify: bool) -> None:
        def load(worker: Any) -> None:
            from vllm.config import set_current_vllm_config

            with set_current_vllm_config(worker.vllm_config):
                self._weights.load(worker.model_runner, source, verify=verify)

        with self._vllm_context():
            try:
                self._llm.collective_rpc(load)
            except WeightSyncError:
                raise
            except Exception as error:
                raise WeightSyncError(f"{type(error).__name__}: {error}", phase="load", receiver=self.kind) from error

    def _reset_caches(self) -> None:
        """Empty the prefix, multimodal and encoder caches, and KV connectors: they hold results of the old weights."""
        with self._vllm_context():
            if not self._llm.reset_prefix_cache(reset_connector=True):
                raise WeightSyncError("the prefix cache could not be reset", phase="reset_cache", receiver=self.kind)
            self._engine.reset_mm_cache()
            self._engine.reset_encoder_cache()

    def pause(self, mode: PauseMode) -> None:
        """Does nothing: the scheduler runs only within calls, and the caller's state machine refuses new calls."""

    def resume(self) -> None:
        """Does nothing; see `pause`."""

    def sleep(self, level: int) -> SleepReport:
        """Free device memory. On a CPU, where vLLM cannot do that, only stop scheduling."""
        if level not in self._slept:
            # Verify once what wakes from such a sleep: the weights, or those that the next sync brings.
            self._slept.add(level)
            self._verified = False
            self._verifier.before_sleep([self], level, keeps_weights=level == 1 or self.device_type == "cpu")
        self._awake = False
        with self._vllm_context():
            if self.device_type == "cpu":
                self._llm.reset_prefix_cache()  # as on a GPU, where sleeping discards the KV cache
                self._llm.sleep(level=0)
                return SleepReport(memory_freed=False)
            before = MemoryReading.now()
            self._llm.sleep(level=level)
            if level == 2:
                self._weights.forget()
            return sleep_report(before, MemoryReading.now())

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        """Allocate the memory of the given tags (`weights`, `kv_cache`) again."""
        with self._vllm_context():
            report = SleepReport(memory_freed=False) if self.device_type == "cpu" else self._wake_device(tags)
            if self.device_type == "cpu" and "kv_cache" in tags:
                self._llm.wake_up(tags=["scheduling"])
        self._awake = self._awake or "kv_cache" in tags
        return report

    def _wake_device(self, tags: Sequence[str]) -> SleepReport:
        """One tag after the other, to measure the memory of each. Raises `PartlyAwake`, with the bytes it lacks."""
        readings = [MemoryReading.now()]
        for number, tag in enumerate(tags):
            try:
                self._llm.wake_up(tags=[tag])
            except Exception as error:
                now = MemoryReading.now()
                problem = f"{now.asleep.get(tag, 0):,} bytes are still to be allocated, and {now.free:,} are free"
                raise PartlyAwake(f"{problem}: {type(error).__name__}: {error}", tags[:number]) from error
            readings.append(MemoryReading.now())
        return wake_report(readings, tags)

    def close(self) -> None:
        """Shut the engine core down and free its memory."""
        engine = self._engine
        self._weights = RecordedCopy()
        process_group.shut_down(engine.engine_core)
        del engine, self._llm, self._engine, self._adapters, self._admission
        gc.collect()
        if self.device_type != "cpu":
            torch.accelerator.empty_cache()


def _defaults(device_type: str, ranks: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        # With external_launcher the trainer's ranks are the workers; it needs their process group
        "distributed_executor_backend": "external_launcher" if ranks > 1 else "uni",
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": False,  # a request's timing comes from these statistics
        "max_num_batched_tokens": 4096,  # with vLLM's default of 32768 its memory profile is too high
    }
    if device_type == "cpu":
        defaults |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enforce_eager": True}
    return defaults
