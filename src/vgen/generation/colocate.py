"""Generation with vLLM in the trainer's own process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..engines.base import InProcess
from ..profiling import ProfilingContext, names
from ..profiling.device import memory
from ..ranks import GroupRanks, Ranks, SingleRank
from ..weights.source import ModuleSource, engine_dtype, source_of
from .base import Generation
from .stall import STALL_SECONDS

if TYPE_CHECKING:
    import torch


class ColocateGeneration(Generation):
    """Generates with vLLM in the trainer's own process, from the trainer's own model.

        with ColocateGeneration(model, processing_class=tokenizer, profiling=profiling) as generation:
            rollouts = generation.generate(prompts, Sampling(max_tokens=512), num_generations=8)
            generation.sync_weights(version="step-1")

    Where the model's `name_or_path` names a checkpoint, vLLM starts from that; a model that was never
    saved is handed over before the first generation. Construction leaves random states, threads,
    environment and the default process group of the process as they were.

    Args:
        model: The trainer's model: a module with a `config`, sharded, wrapped or with adapters as `source_of` takes it.
            It is read at every sync and never written; adapters are merged into copies. Or such a source of it, which
            leaves weights out or renames them.
        accelerator: An `accelerate.Accelerator`, for the number of this rank; else torch.distributed is asked.
        processing_class: The tokenizer or processor, for prompts given as text; `tokenizer` is the same.
        tensor_parallel_size: Trainer ranks that share one engine. Must divide the number of ranks.
        gpu_memory_utilization: Fraction of the device's memory for weights and KV cache; without meaning on a CPU.
        max_model_length: Longest prompt and completion together, in tokens. The model's own by default.
        max_num_seqs: Sequences that run at a time.
        model_impl: `auto`, `vllm` or `transformers`, as vLLM takes it.
        enable_sleep_mode: Needed for `sleep`.
        weight_transport: `recorded`, which is refused where it is not safe, or `reload`; by default whichever is.
        structured_outputs_regex: What completions must match, where a `Sampling` says nothing itself.
        quantization: vLLM's quantization method.
        trust_remote_code: Whether code that comes with a checkpoint may run.
        seed: The engine's seed; by default the number of this rank's engine, so that ranks differ.
        request_spans: How many requests of a call, the slowest ones, become spans; all are in the metrics.
        traced_requests: How many requests of a call, random ones, are traced from their dispatch, the engine's own
            span beneath theirs; or a function of the step's number, for chosen steps.
        stall_seconds: After how long without a token, a completion or a phase a call counts as stalled, which is
            logged and shown while it lasts; None for never.
        show_progress: Whether long calls show a progress bar on a terminal.
        weight_version: What the weights are called until the first sync: a resumed run's own last version.
        profiling: Where spans and measurements go.
        engine_kwargs: Anything else that `vllm.LLM` takes, under its own name; goes before what is set above.

    Raises:
        EngineError: vLLM could not start.
        MissingExtraError: It is not installed.
    """

    def __init__(
        self,
        model: torch.nn.Module | ModuleSource,
        *,
        accelerator: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_length: int | None = None,
        max_num_seqs: int | None = None,
        model_impl: str = "auto",
        enable_sleep_mode: bool = False,
        weight_transport: InProcess | None = None,
        structured_outputs_regex: str | None = None,
        quantization: str | None = None,
        trust_remote_code: bool = False,
        seed: int | None = None,
        request_spans: int = 8,
        traced_requests: int | Callable[[int | None], int] = 2,
        stall_seconds: float | None = STALL_SECONDS,
        show_progress: bool = False,
        weight_version: str = "0",
        profiling: ProfilingContext = ProfilingContext.disabled(),
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        from ..engines.checkpoint import checkpoint_of
        from ..engines.colocate import ColocateEngine

        rank, world_size = _placement(accelerator)
        if world_size % tensor_parallel_size:
            raise ValueError(f"tensor_parallel_size {tensor_parallel_size} must divide the {world_size} ranks evenly")
        processing_class = processing_class or tokenizer
        source = source_of(model)
        checkpoint = checkpoint_of(source.model, processing_class)
        settings: dict[str, Any] = dict(
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_length,
            model_impl=model_impl,
            enable_sleep_mode=enable_sleep_mode,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
            seed=seed if seed is not None else rank // tensor_parallel_size,
            dtype=engine_dtype(source),
            tokenizer=checkpoint.tokenizer,
            skip_tokenizer_init=checkpoint.tokenizer is None,
            weight_version=weight_version,
        )
        if max_num_seqs is not None:
            settings["max_num_seqs"] = max_num_seqs
        if checkpoint.folder is not None:
            settings["load_format"] = "dummy"
        profiling = profiling.bind({names.RANK: rank})
        try:
            own = {names.MODEL: checkpoint.path, names.ENGINE: ColocateEngine.kind}
            with profiling.span(names.ENGINE_INIT, own) as span:
                engine = ColocateEngine(
                    checkpoint.path, weight_transport=weight_transport, **settings | dict(engine_kwargs or {})
                )
                span.set({names.DEVICE: engine.device_type, **(memory() if profiling.enabled else {})})
        finally:
            if checkpoint.folder is not None:
                checkpoint.folder.cleanup()
        super().__init__(
            engine,
            source,
            tokenizer=processing_class,
            ranks=_tensor_parallel_ranks(world_size, tensor_parallel_size),
            stale=checkpoint.stale,
            sleep_mode=enable_sleep_mode,
            structured_outputs_regex=structured_outputs_regex,
            request_spans=request_spans,
            traced_requests=traced_requests,
            stall_seconds=stall_seconds,
            show_progress=show_progress,
            weight_version=weight_version,
            profiling=profiling,
        )


def _placement(accelerator: Any) -> tuple[int, int]:
    """This rank and the number of ranks."""
    if accelerator is not None:
        return accelerator.process_index, accelerator.num_processes
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _tensor_parallel_ranks(world_size: int, size: int) -> Ranks:
    """The ranks that are one engine's workers: all of them must ask it for the same."""
    if size == 1:
        return SingleRank()
    import torch.distributed as dist

    group, _ = dist.new_subgroups_by_enumeration([list(range(i, i + size)) for i in range(0, world_size, size)])
    return GroupRanks(group)
