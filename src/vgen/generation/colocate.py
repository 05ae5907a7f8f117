"""Generation with vLLM in the trainer's own process."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Unpack

from ..arguments import checked_call, flag, integer, mapping, number, refuse_unknown
from ..distributed.placement import Placement, all_ranks
from ..engine_protocol import InProcess, Source
from ..errors import EngineError
from ..profiling import ProfilingContext, semconv
from ..profiling.device_timing import memory
from ..weights.source.module_source import ModuleSource, engine_dtype, source_of
from ..weights.source.unwrap_model import unwrapped
from ..weights.verification.checkpoint_rows import equal_checkpoint
from .generation import Generation
from .options import GenerationOptions, profiling_context
from .weight_sync import version_name

if TYPE_CHECKING:
    import torch

    from ..engines.inprocess.initial_checkpoint import InitialCheckpoint

logger = logging.getLogger(__name__)

InitialWeights: TypeAlias = Literal["model", "checkpoint"]
"""Where an engine's first weights come from: the trainer's model, or the checkpoint if that has the same weights."""


class ColocateGeneration(Generation):
    """Generates with vLLM in the trainer's own process, from the trainer's own model.

        with ColocateGeneration(model, processing_class=tokenizer, profiling=profiling) as generation:
            rollouts = generation.generate(prompts, Sampling(max_tokens=512), num_generations=8)
            generation.sync_weights(version="step-1")

    vLLM builds its model from the configuration that the trainer's model has now. The first generation syncs the
    trainer's weights; the ranks of a sharded model make it together. A completion ends at each end-of-sequence token of
    the model's `generation_config`, whose sampling defaults have no effect. The constructor leaves the model, its
    class, and the random states, threads, environment and default process group of the process as they were.

    With a folder or hub name in place of the model the engine is frozen: a teacher, judge or reference. It loads that
    checkpoint in its own dtype and keeps its weights. `sync_weights`, `verify`, and `sleep(level=2)`, which would
    discard them, then raise `EngineStateError`.

    Args:
        model: The trainer's model: a module with a `config`, which may be sharded, wrapped or have adapters. vgen reads
            it at every sync and never writes to it; adapters are merged into copies. Or a `ModuleSource` (from
            `vgen.weights.source_of`) that leaves weights out or renames them. Or the checkpoint of a frozen engine.
        accelerator: An `accelerate.Accelerator`, which knows the rank. By default vgen asks torch.distributed.
        tensor_parallel_size: How many trainer ranks share one engine. It must divide the number of ranks.
        gpu_memory_utilization: Fraction of the GPU's memory for weights and KV cache. Has no effect on a CPU.
        max_model_length: Longest prompt and completion together, in tokens. By default the model's own limit.
        max_num_seqs: How many sequences the engine runs at a time. By default vLLM's own choice.
        enable_sleep_mode: Whether `sleep` may be called.
        initial_weights: With `checkpoint` the engine loads the checkpoint that the model was loaded from, and the first
            generation does not sync, if sampled rows of every tensor are equal in both. If they are not, the reason is
            logged as a warning, and the weights come from the model, as by default. It saves a first sync that takes
            longer than loading the checkpoint.
        weight_transport: How weights get into the engine: `recorded` (raises where that is not safe) or `reload`. By
            default `recorded` where it is safe, else `reload`.
        engine_kwargs: Further arguments of `vllm.LLM` under vLLM's own names, such as `quantization`,
            `trust_remote_code`, `model_impl` or `seed`. They override what vgen sets. vgen's `seed` is the number of
            the rank's engine, so that engines sample different completions.
        processing_class, structured_outputs_regex, request_tracing, stall_seconds, show_progress, weight_version,
            profiling: As for `Generation`.

    Raises:
        EngineError: vLLM could not start, would change the trainer's classes, would move experts at run time
            (`enable_eplb`), or would keep keys and values where a weight sync cannot have them discarded (some
            connectors of `kv_transfer_config`); or the model has no `config`.
        WeightSyncError: A weight of the model has no data (it is on the meta device), or cannot be sent.
        MissingExtraError: vLLM is not installed.
        ValueError: `tensor_parallel_size` does not divide the number of ranks.
    """

    @checked_call
    def __init__(
        self,
        model: torch.nn.Module | ModuleSource | str | os.PathLike[str],
        *,
        accelerator: Any = None,
        processing_class: Any = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_length: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        initial_weights: InitialWeights = "model",
        weight_transport: InProcess | None = None,
        weight_version: str | int = "0",
        profiling: ProfilingContext = ProfilingContext.disabled(),
        engine_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> None:
        from ..engines.inprocess.engine import ColocateEngine

        own = inspect.signature(ColocateGeneration).parameters.keys() - {"options"}
        refuse_unknown("ColocateGeneration", options, own | GenerationOptions.__annotations__.keys())
        profiling, weight_version = profiling_context(profiling), version_name(weight_version)
        if max_model_length is not None:
            max_model_length = integer("max_model_length", max_model_length, least=2)
        if max_num_seqs is not None:
            max_num_seqs = integer("max_num_seqs", max_num_seqs, least=1)
        enable_sleep_mode = flag("enable_sleep_mode", enable_sleep_mode)
        share = "gpu_memory_utilization"
        gpu_memory_utilization = number(share, gpu_memory_utilization, lambda value: 0 < value <= 1, "in (0, 1]")
        tensor_parallel_size = integer("tensor_parallel_size", tensor_parallel_size, least=1)
        placement = Placement.of(accelerator)
        placement.check(tensor_parallel_size)
        engine_kwargs = mapping("engine_kwargs", engine_kwargs or {})
        start = (
            _frozen(os.fspath(model))
            if isinstance(model, str | os.PathLike)
            else _from_model(source_of(model), processing_class, initial_weights, engine_kwargs, placement.rank)
        )
        settings: dict[str, Any] = dict(
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_length,
            enable_sleep_mode=enable_sleep_mode,
            seed=placement.rank // tensor_parallel_size,
            tokenizer=start.checkpoint.tokenizer,
            skip_tokenizer_init=start.checkpoint.tokenizer is None,
            weight_version=weight_version,
            **start.settings,
        )
        if max_num_seqs is not None:
            settings["max_num_seqs"] = max_num_seqs
        profiling = profiling.bind({semconv.RANK: placement.rank})
        self._folder = start.checkpoint.folder
        try:
            attributes = {semconv.MODEL: start.name, semconv.ENGINE: ColocateEngine.kind}
            with profiling.span(semconv.ENGINE_INIT, attributes) as span:
                engine = ColocateEngine(
                    start.checkpoint.path,
                    ranks=all_ranks,
                    weight_transport=weight_transport,
                    protected=None if start.source is None else start.source.model,
                    **settings | engine_kwargs,
                )
                span.set({semconv.DEVICE: engine.device_type, **(memory() if profiling.enabled else {})})
        except BaseException:
            self._clean_up()
            raise
        super().__init__(
            engine,
            start.source,
            processing_class=processing_class,
            ranks=placement.tensor_parallel_ranks(tensor_parallel_size),
            stale=start.stale,
            sleep_mode=enable_sleep_mode,
            weight_version=weight_version,
            profiling=profiling,
            **options,
        )

    def close(self) -> None:
        super().close()
        self._clean_up()

    def _clean_up(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


@dataclass(frozen=True, slots=True)
class _Start:
    """What an engine starts from."""

    name: str
    """Of the model, for telemetry."""
    checkpoint: InitialCheckpoint
    source: Source | None
    """None if the engine is frozen."""
    stale: bool
    """Whether the engine starts without the trainer's weights."""
    settings: dict[str, Any]
    """Further arguments of `vllm.LLM`."""


def _frozen(path: str) -> _Start:
    from ..engines.inprocess.initial_checkpoint import frozen_checkpoint, stored_dtype

    return _Start(path, frozen_checkpoint(path), None, stale=False, settings={"dtype": stored_dtype(path)})


def _from_model(
    source: Source, processing_class: Any, initial: InitialWeights, engine_kwargs: dict[str, Any], rank: int
) -> _Start:
    from ..engines import kv_stores
    from ..engines.inprocess.initial_checkpoint import DUMMY_TARGET, checkpoint_of, name_of

    if engine_kwargs.get("enable_eplb"):
        raise EngineError(
            "enable_eplb moves experts while the engine runs, so that a weight sync could write to an old place: leave "
            "enable_eplb and eplb_config out of engine_kwargs"
        )
    if problem := kv_stores.refusal(engine_kwargs):
        raise EngineError(problem)
    module = unwrapped(source.model)
    if not hasattr(module, "config"):
        raise EngineError(
            f"{type(module).__name__} has no `config`, from which vLLM builds its model: pass a transformers model, or "
            "generate with servers that hold the model already, by ServerGeneration"
        )
    dtype = engine_dtype(source)
    name, revision = name_of(module), getattr(module.config, "_commit_hash", None)
    weights = equal_checkpoint(source, name, revision, all_ranks().any) if initial == "checkpoint" else None
    checkpoint = checkpoint_of(source.model, processing_class, weights=weights, number=rank)
    settings: dict[str, Any] = {"dtype": dtype}
    if name:
        settings["served_model_name"] = name
    if weights is None:
        settings["load_format"] = "dummy"
        speculative = engine_kwargs.get("speculative_config") or {}
        if speculative.get("model"):  # no sync brings the draft model's weights
            engine_kwargs["speculative_config"] = {"draft_load_config": {"load_format": "auto"}, **speculative}
            settings["load_format"] = DUMMY_TARGET
        elif speculative.get("method") in ("mtp", "dspark"):
            logger.warning(
                "vgen: the draft layers of speculative_config have random weights: a sync brings none, and there is no "
                "checkpoint. Name their folder as its 'model', or none of their tokens will be accepted"
            )
    stale = weights is None or "load_format" in engine_kwargs
    return _Start(name or type(module).__name__, checkpoint, source, stale, settings)
