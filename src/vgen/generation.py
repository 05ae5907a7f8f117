"""Generation objects: an engine, the trainer's weights and a profiling context, composed."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .engines.base import Engine, EngineState, Request, StateMachine
from .errors import EngineError, EngineStateError, PromptError, VgenError
from .profiling import ProfilingContext, Span, names
from .ranks import GroupRanks, Ranks, SingleRank
from .types import Completion, Completions, Prompt, Sampling, SleepReport, SyncReport
from .weights.source import ModuleSource

if TYPE_CHECKING:
    import torch

TAGS = ("weights", "kv_cache")
"""What sleeping gives back and `wake_up` takes again, under vLLM's names."""


class ColocateGeneration:
    """Generates with vLLM in the trainer's own process, from the trainer's own model.

        with ColocateGeneration(model, processing_class=tokenizer, profiling=profiling) as generation:
            rollouts = generation.generate(prompts, Sampling(max_tokens=512), num_generations=8)
            generation.sync_weights(version="step-1")

    `model` is a `transformers` model or any module with a `config`. Where its `name_or_path` names a
    checkpoint, vLLM starts from that; a model that was never saved is handed over before the first
    generation. Construction leaves random states, threads, environment and the default process group of
    the process as they were. One call at a time: `generate` waits for another thread's `generate`, all
    else is refused with `EngineStateError`.

    Args:
        model: The trainer's model. It is read at every `sync_weights` and never written.
        accelerator: An `accelerate.Accelerator`, for the number of this rank; else torch.distributed is asked.
        processing_class: The tokenizer or processor, for prompts given as text; `tokenizer` is the same.
        tensor_parallel_size: Trainer ranks that share one engine. Must divide the number of ranks.
        gpu_memory_utilization: Fraction of the device's memory for weights and KV cache; without meaning on a CPU.
        max_model_length: Longest prompt and completion together, in tokens. The model's own by default.
        max_num_seqs: Sequences that run at a time.
        model_impl: `auto`, `vllm` or `transformers`, as vLLM takes it.
        enable_sleep_mode: Needed for `sleep`.
        structured_outputs_regex: What completions must match, where a `Sampling` says nothing itself.
        quantization: vLLM's quantization method.
        trust_remote_code: Whether code that comes with a checkpoint may run.
        seed: The engine's seed; by default the number of this rank's engine, so that ranks differ.
        request_spans: How many requests of a call, the slowest ones, become spans; all are in the metrics.
        profiling: Where spans and measurements go.
        engine_kwargs: Anything else that `vllm.LLM` takes, under its own name; goes before what is set above.
    """

    def __init__(
        self,
        model: torch.nn.Module,
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
        structured_outputs_regex: str | None = None,
        quantization: str | None = None,
        trust_remote_code: bool = False,
        seed: int | None = None,
        request_spans: int = 8,
        profiling: ProfilingContext = ProfilingContext.disabled(),
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        from .engines.colocate import ColocateEngine

        rank, world_size = _placement(accelerator)
        if world_size % tensor_parallel_size:
            raise ValueError(f"tensor_parallel_size {tensor_parallel_size} must divide the {world_size} ranks evenly")
        self._ranks: Ranks = SingleRank()
        if tensor_parallel_size > 1:
            self._ranks = GroupRanks(_subgroup(world_size, tensor_parallel_size))
        self._profiling = profiling.bind({names.RANK: rank, names.ENGINE: ColocateEngine.kind})
        self._source = ModuleSource(model)
        self._tokenizer = getattr(processing_class or tokenizer, "tokenizer", processing_class or tokenizer)
        self._regex, self._request_spans = structured_outputs_regex, request_spans
        self._states, self._busy = StateMachine(), threading.Lock()
        self._sleep_mode = enable_sleep_mode
        self._asleep: set[str] = set()
        self._syncs = 0
        self._version = "0"
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        path, tokenizer_path, self._stale = self._checkpoint(model, processing_class or tokenizer)
        settings: dict[str, Any] = dict(
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_length,
            model_impl=model_impl,
            enable_sleep_mode=enable_sleep_mode,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
            seed=seed if seed is not None else rank // tensor_parallel_size,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        )
        if max_num_seqs is not None:
            settings["max_num_seqs"] = max_num_seqs
        if self._stale:
            settings["load_format"] = "dummy"
        settings |= {"skip_tokenizer_init": True} if tokenizer_path is None else {"tokenizer": tokenizer_path}
        with self._profiling.span(names.ENGINE_INIT, {names.MODEL: path}) as span:
            try:
                self._engine: Engine = ColocateEngine(path, **settings | dict(engine_kwargs or {}))
            except BaseException:
                self._states.move("construction", EngineState.CLOSED)
                self._forget_folder()
                raise
            span.set({names.DEVICE: self._engine.device_type})
        self._engine.set_weight_version(self._version)
        self._states.move("construction", EngineState.AWAKE)

    @property
    def state(self) -> EngineState:
        """What the engine is doing."""
        return self._states.state

    @property
    def weight_version(self) -> str:
        """The version given to the last sync; `"0"` before the first."""
        return self._version

    @property
    def engine(self) -> Any:
        """The engine beneath, for what this class does not cover; `engine.llm` is the `vllm.LLM`."""
        return self._engine

    @property
    def max_model_length(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self._engine.max_model_length

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        *,
        refused: Literal["raise", "mark"] = "raise",
        on_completion: Callable[[Completion], None] | None = None,
    ) -> Completions:
        """Sample `num_generations` completions of each prompt.

        Prompts are token ids, or text where a tokenizer was given. Completions come back in prompt order;
        `on_completion` is called, in this thread, with each as it is done.

        Raises:
            PromptError: A prompt is empty, too long or holds an unknown id. Nothing was generated. With
                `refused="mark"` the others are, and its completions carry the error.
            EngineStateError: The engine is asleep, failed or closed.
            EngineError: The engine broke; it is `failed` now.
        """
        if num_generations < 1:
            raise ValueError(f"num_generations must be at least 1, got {num_generations}")
        if sampling.structured_outputs_regex is None and self._regex is not None:
            sampling = replace(sampling, structured_outputs_regex=self._regex)
        with self._busy:
            self._states.require("generate", EngineState.AWAKE)
            own = {names.PROMPTS: len(prompts), names.NUM_GENERATIONS: num_generations}
            with self._profiling.span(names.GENERATE, own) as span:
                prompt_ids, errors = self._encode(prompts)
                if errors and refused == "raise":
                    raise next(iter(errors.values()))
                if self._stale:
                    self._restore()
                span.set({names.WEIGHT_VERSION: self._version, names.REFUSED: len(errors) or None})
                good = [ids for index, ids in enumerate(prompt_ids) if index not in errors]
                everyone, start = self._ranks.gather(good)
                requests = _requests(everyone, num_generations, sampling.seed)
                with self._profiling.span(names.ENGINE_GENERATE) as engine_span:
                    sampled = self._sample(requests, sampling, on_completion)
                with self._profiling.span(names.DECODE_OUTPUTS):
                    mine = sampled[start * num_generations : (start + len(good)) * num_generations]
                    completions = _place(mine, len(prompts), num_generations, errors)
                result = Completions(prompt_ids, completions, num_generations, self._version)
                if self._profiling.enabled:
                    self._measure(span, engine_span, result)
                return result

    def sync_weights(self, version: str | None = None) -> SyncReport:
        """Replace the engine's weights by the trainer model's, and label what is sampled from then on.

        `version` defaults to the count of syncs. When anything fails the engine's weights are unknown:
        it is `failed` and refuses to generate until a later sync succeeds.

        Raises:
            WeightSyncError: The weights did not arrive whole; names phase and parameter.
            EngineStateError: The engine is closed or busy, or its weights are asleep.
        """
        with self._exclusive("sync_weights"):
            if "weights" in self._asleep:
                raise EngineStateError("sync_weights", self._states.describe(), "call wake_up(['weights']) first")
            self._syncs += 1
            return self._sync(version if version is not None else str(self._syncs))

    def sleep(self, level: int = 1) -> SleepReport:
        """Give the engine's memory to the trainer. Level 1 keeps the weights in host memory, level 2 discards them.

        On a CPU vLLM cannot free memory: the engine stops scheduling, and the report and span say so.

        Raises:
            EngineStateError: The engine is not awake, or sleep mode was not enabled.
        """
        if level not in (1, 2):
            raise ValueError(f"level must be 1 or 2, got {level!r}")
        with self._exclusive("sleep"):
            self._states.require("sleep", EngineState.AWAKE)
            if not self._sleep_mode:
                # vLLM itself would report success and free nothing
                raise EngineStateError("sleep", "awake", "construct with enable_sleep_mode=True")
            with self._profiling.span(names.SLEEP, {names.SLEEP_LEVEL: level}) as span:
                self._states.move("sleep", EngineState.ASLEEP, f"level {level}")
                with self._failing("sleep"):
                    report = self._engine.sleep(level)
                self._asleep = set(TAGS)
                self._stale = self._stale or (level == 2 and report.memory_freed)
                span.set({names.MEMORY_FREED: report.memory_freed, names.DEVICE_BYTES: report.device_bytes})
        return replace(report, seconds=span.duration or 0.0)

    def wake_up(self, tags: Sequence[str] | None = None) -> SleepReport:
        """Take memory again: `["weights"]`, `["kv_cache"]`, or both when None. Awake once both are back.

        After a level-2 sleep the weights are restored from the trainer's model before the first token,
        unless `sync_weights` has brought them first.

        Raises:
            EngineStateError: The engine is not asleep.
        """
        for tag in tags or ():
            if tag not in TAGS:
                raise ValueError(f"tags must be among {', '.join(TAGS)}, got {tag!r}")
        with self._exclusive("wake_up"):
            self._states.require("wake_up", EngineState.ASLEEP)
            detail = self._states.detail
            asked = [tag for tag in TAGS if tag in (tags or TAGS)]
            with self._profiling.span(names.WAKE_UP, {names.WAKE_TAGS: asked}) as span:
                self._states.move("wake_up", EngineState.WAKING, detail)
                with self._failing("wake_up"):
                    report = self._engine.wake_up(asked)
                self._asleep -= set(asked)
                if self._asleep:
                    self._states.move("wake_up", EngineState.ASLEEP, detail)
                else:
                    self._states.move("wake_up", EngineState.AWAKE)
                span.set({names.DEVICE_BYTES: report.device_bytes, names.RESTORED: self._stale or None})
        return replace(report, seconds=span.duration or 0.0)

    def close(self) -> None:
        """Shut the engine down. Twice does no harm; anything else afterwards raises `EngineStateError`."""
        if self._states.state is EngineState.CLOSED:
            return
        with self._busy:
            self._states.move("close", EngineState.CLOSED)
            self._engine.close()
            self._forget_folder()

    def __enter__(self) -> ColocateGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checkpoint(self, model: Any, processing_class: Any) -> tuple[str, str | None, bool]:
        """What vLLM loads: the checkpoint, or a folder with the config alone; the tokenizer; which of the two."""
        path = str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", ""))
        if path and (not Path(path).is_absolute() or Path(path).is_dir()):
            # a hub name, or a folder; vLLM says so itself when a name is not to be had
            own = str(getattr(processing_class, "name_or_path", "") or "")
            return path, own if own and Path(own).is_dir() else path, False
        self._folder = tempfile.TemporaryDirectory(prefix="vgen-model-")
        config = model.config
        if not config.architectures:
            config = type(config).from_dict({**config.to_dict(), "architectures": [type(model).__name__]})
        config.save_pretrained(self._folder.name)
        if processing_class is None:
            return self._folder.name, None, True
        processing_class.save_pretrained(self._folder.name)
        return self._folder.name, self._folder.name, True

    def _forget_folder(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    @contextmanager
    def _exclusive(self, call: str) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise EngineStateError(call, "at work in another thread", "wait for that call to return")
        try:
            yield
        finally:
            self._busy.release()

    @contextmanager
    def _failing(self, call: str) -> Iterator[None]:
        """Whatever is raised within leaves the engine failed."""
        try:
            yield
        except BaseException as error:
            self._states.move(call, EngineState.FAILED, f"{call} raised {type(error).__name__}")
            if isinstance(error, VgenError) or not isinstance(error, Exception):
                raise
            raise EngineError(f"the engine failed in {call}: {type(error).__name__}") from error

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[list[list[int]], dict[int, PromptError]]:
        limit, vocabulary = self._engine.max_model_length - 1, self._engine.vocabulary_size
        encoded: list[list[int]] = []
        errors: dict[int, PromptError] = {}
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                if self._tokenizer is None:
                    raise TypeError(f"prompt {index} is text: construct with processing_class to pass text")
                ids = list(self._tokenizer(prompt)["input_ids"])
            else:
                ids = list(prompt)
            if not ids:
                errors[index] = PromptError(index, "is empty")
            elif len(ids) > limit:
                problem = f"has {len(ids)} tokens; at most {limit} leave room for a completion"
                errors[index] = PromptError(index, problem, limit)
            elif min(ids) < 0 or max(ids) >= vocabulary:
                problem = f"holds a token id outside the vocabulary of {vocabulary}"
                errors[index] = PromptError(index, problem, vocabulary)
            encoded.append([] if index in errors else ids)
        return encoded, errors

    def _sample(
        self, requests: list[Request], sampling: Sampling, on_completion: Callable[[Completion], None] | None
    ) -> list[Completion]:
        try:
            return self._engine.generate(requests, sampling, on_completion)
        except VgenError:
            raise
        except ValueError:
            raise  # vLLM refused a parameter; the requests before it are aborted and the engine is well
        except Exception as error:
            self._states.move("generate", EngineState.FAILED, f"generate raised {type(error).__name__}")
            raise EngineError(f"the engine failed in generate: {type(error).__name__}") from error

    def _sync(self, version: str) -> SyncReport:
        source, profiling = self._source, self._profiling
        then = EngineState.ASLEEP if self._asleep else EngineState.AWAKE
        own = {names.WEIGHT_VERSION: version, names.TRANSPORT: "reload", names.TRANSPORT_REASON: "in process"}
        with (
            profiling.span(names.WEIGHT_SYNC, own) as span,
            self._states.during("sync_weights", EngineState.SYNCING, then, self._states.detail),
        ):
            with profiling.span(names.SYNC_LOAD) as load:
                self._engine.load_weights(source)
                load.set({names.GATHER_SECONDS: source.seconds})
            with profiling.span(names.SYNC_RESET):
                self._engine.reset_caches()
                self._engine.set_weight_version(version)
            span.set({names.SYNC_BYTES: source.bytes, names.SYNC_TENSORS: source.tensors})
        self._version, self._stale = version, False
        return SyncReport(version=version, bytes=source.bytes, tensors=source.tensors, seconds=span.duration or 0.0)

    def _restore(self) -> None:
        """Bring the trainer's weights into an engine that holds none."""
        self._sync(self._version)

    def _measure(self, span: Span, engine_span: Span, result: Completions) -> None:
        """The counts of a call onto its span, every request into the metrics, the slowest as spans."""
        profiling = self._profiling
        done = [completion for completion in result if completion.error is None]
        tokens_in = sum(len(result.prompt_ids[completion.prompt_index]) for completion in done)
        tokens_out = result.output_tokens
        span.set({
            names.COMPLETIONS: len(done), names.INPUT_TOKENS: tokens_in, names.OUTPUT_TOKENS: tokens_out,
        })  # fmt: skip
        if not done:
            return
        profiling.record(names.PROMPT_TOKENS, tokens_in)
        profiling.record(names.GENERATED_TOKENS, tokens_out)
        profiling.record_many(names.COMPLETION_LENGTH, [len(completion.token_ids) for completion in done])
        timed = [(completion, completion.timing) for completion in done if completion.timing is not None]
        timings = [timing for _, timing in timed]
        profiling.record_many(names.REQUEST_E2E, [timing.e2e for timing in timings])
        profiling.record_many(names.REQUEST_QUEUE, [timing.queue for timing in timings])
        profiling.record_many(names.REQUEST_PREFILL, [timing.prefill for timing in timings])
        profiling.record_many(names.REQUEST_TTFT, [timing.time_to_first_token for timing in timings])
        per_token = [timing.time_per_output_token for timing in timings]
        profiling.record_many(names.REQUEST_TPOT, [seconds for seconds in per_token if seconds is not None])
        slowest = sorted(timed, key=lambda pair: pair[1].e2e, reverse=True)[: self._request_spans]
        for completion, timing in sorted(slowest, key=lambda pair: pair[1].queued_ns):
            own = {
                names.REQUEST_ID: completion.request_id,
                names.PROMPT_INDEX: completion.prompt_index,
                names.GENERATION_INDEX: completion.generation_index,
                names.INPUT_TOKENS: len(result.prompt_ids[completion.prompt_index]),
                names.OUTPUT_TOKENS: len(completion.token_ids),
                names.FINISH_REASON: [completion.finish_reason or "unknown"],
                names.WEIGHT_VERSION: completion.weight_version,
                names.QUEUE_SECONDS: timing.queue,
                names.TTFT_SECONDS: timing.time_to_first_token,
                names.TPOT_SECONDS: timing.time_per_output_token,
                names.PREEMPTIONS: timing.preemptions,
                names.CACHED_TOKENS: timing.cached_tokens,
            }
            profiling.rebuilt(names.REQUEST, timing.queued_ns, timing.finished_ns, own, parent=engine_span)


def _requests(prompts: list[list[int]], num_generations: int, seed: int | None) -> list[Request]:
    return [
        Request(index, generation, ids, None if seed is None else seed + index * num_generations + generation)
        for index, ids in enumerate(prompts)
        for generation in range(num_generations)
    ]


def _place(
    sampled: list[Completion], prompts: int, num_generations: int, errors: Mapping[int, PromptError]
) -> list[Completion]:
    """Completions at their prompts' places in the caller's list, refused prompts marked."""
    arrived = iter(sampled)
    placed: list[Completion] = []
    for index in range(prompts):
        for generation in range(num_generations):
            if index in errors:
                placed.append(
                    Completion(
                        prompt_index=index,
                        generation_index=generation,
                        token_ids=[],
                        finish_reason="error",
                        error=errors[index],
                    )
                )
            else:
                placed.append(replace(next(arrived), prompt_index=index))
    return placed


def _placement(accelerator: Any) -> tuple[int, int]:
    """This rank and the number of ranks."""
    if accelerator is not None:
        return accelerator.process_index, accelerator.num_processes
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _subgroup(world_size: int, size: int) -> Any:
    import torch.distributed as dist

    group, _ = dist.new_subgroups_by_enumeration([list(range(i, i + size)) for i in range(0, world_size, size)])
    return group
