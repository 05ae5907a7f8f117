"""Generation objects: an engine, the trainer's weights and a profiling context, composed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from .engines.base import Engine, EngineState, Request, Source, StateMachine
from .errors import EngineError, EngineStateError, PromptError, VgenError
from .profiling import ProfilingContext, Span, names
from .profiling.device import DeviceTimer, memory
from .profiling.rollouts import counts, measure
from .ranks import GroupRanks, Ranks, SingleRank
from .types import Completion, Completions, Prompt, Sampling, SleepReport, SyncReport
from .weights.names import unwrapped
from .weights.source import engine_dtype, one_pass, source_of

if TYPE_CHECKING:
    import torch

TAGS = ("weights", "kv_cache")
"""What sleeping gives back and `wake_up` takes again, under vLLM's names."""


class Generation:
    """Generates with an engine that it is given, keeps its weights in step with a source, and guards its state.

    The generation classes differ in the engine they make. One call at a time: `generate` waits for
    another thread's `generate`, all else is refused with `EngineStateError`.

    Args:
        engine: What generates. It is closed with this object.
        source: The trainer's weights: re-iterable, with `bytes`, `tensors` and `seconds` of the last pass.
        tokenizer: For prompts given as text.
        ranks: The trainer ranks that share the engine.
        stale: Whether the engine has no weights of the trainer's yet: they are brought before the first token.
        sleep_mode: Whether `sleep` may be called.
        structured_outputs_regex: What completions must match, where a `Sampling` says nothing itself.
        request_spans: How many requests of a call, the slowest ones, become spans; all are in the metrics.
        weight_version: What the weights are called until the first sync: a resumed run's own last version.
        profiling: Where spans and measurements go.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        *,
        tokenizer: Any = None,
        ranks: Ranks | None = None,
        stale: bool = False,
        sleep_mode: bool = True,
        structured_outputs_regex: str | None = None,
        request_spans: int = 8,
        weight_version: str = "0",
        profiling: ProfilingContext = ProfilingContext.disabled(),
    ) -> None:
        self._engine, self._source, self._ranks = engine, source, ranks or SingleRank()
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._regex, self._request_spans, self._sleep_mode = structured_outputs_regex, request_spans, sleep_mode
        self._profiling = profiling.bind({names.ENGINE: engine.kind})
        self._device = DeviceTimer(self._profiling)
        self._states, self._busy = StateMachine(), threading.Lock()
        self._owner: int | None = None
        self._asleep, self._level = set[str](), ""
        self._stale, self._syncs, self._version = stale, 0, weight_version
        self._states.move("construction", EngineState.AWAKE)

    @property
    def state(self) -> EngineState:
        """What the engine is doing."""
        return self._states.state

    @property
    def weight_version(self) -> str:
        """The version given to the last sync; before the first, the one given at construction."""
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
        with self._generating("generate"):
            own = {names.PROMPTS: len(prompts), names.NUM_GENERATIONS: num_generations}
            with self._profiling.span(names.GENERATE, own) as span:
                job = self._prepare(prompts, sampling, num_generations, refused)
                span.set({names.WEIGHT_VERSION: self._version, names.REFUSED: len(job.errors) or None})
                with self._profiling.span(names.ENGINE_GENERATE) as engine_span:
                    sampled = self._sample(job, on_completion)
                with self._profiling.span(names.DECODE_OUTPUTS):
                    result = job.place(sampled, self._version)
                if self._profiling.enabled:
                    span.set(counts(result))
                    measure(self._profiling, engine_span, result, self._request_spans, self._decode)
                return result

    async def agenerate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        *,
        refused: Literal["raise", "mark"] = "raise",
        on_completion: Callable[[Completion], None] | None = None,
    ) -> Completions:
        """`generate` for asynchronous trainers: on a thread of its own, beneath the open span.

        `on_completion` is called on that thread. Cancelling aborts what is not done yet.
        """
        import asyncio

        cancelled = threading.Event()

        def check(completion: Completion) -> None:
            if cancelled.is_set():
                raise asyncio.CancelledError
            if on_completion is not None:
                on_completion(completion)

        call = partial(self.generate, refused=refused, on_completion=check)
        try:
            return await asyncio.to_thread(call, prompts, sampling, num_generations)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        *,
        refused: Literal["raise", "mark"] = "raise",
    ) -> Generator[Completion]:
        """Yield each completion as it is done, so that rewards can start; raises as `generate` does.

        Leaving the loop early aborts the rest. Until it has ended the engine is taken: other calls of
        this thread are refused. Its span is recorded at the end, and covers what the caller did between
        two completions.
        """
        if not isinstance(self._ranks, SingleRank):
            raise ValueError("stream() serves one rank; ranks that share an engine generate together")
        profiling, parent, start = self._profiling, self._profiling.current_span(), time.monotonic_ns()
        with self._generating("stream"):
            job = self._prepare(prompts, sampling, num_generations, refused)
            done: dict[tuple[int, int], Completion] = {}
            error: str | None = None
            try:
                yield from (completion for completion in job.place([], self._version) if completion.error is not None)
                with closing(self._engine.stream(job.requests, job.sampling, profiling.carrier())) as stream:
                    for completion in stream:
                        done[completion.prompt_index, completion.generation_index] = completion
                        yield job.own(completion)
            except BaseException as raised:
                error = type(raised).__name__
                if isinstance(raised, EngineError):
                    self._states.move("stream", EngineState.FAILED, str(raised))
                raise
            finally:
                if profiling.enabled:
                    end = time.monotonic_ns()
                    result = job.place(list(done.values()), self._version)
                    own: dict[str, Any] = {names.PROMPTS: len(prompts), names.NUM_GENERATIONS: num_generations}
                    own |= {names.WEIGHT_VERSION: self._version, **counts(result)}
                    span = profiling.rebuilt(names.GENERATE, start, end, own, parent=parent, error=error)
                    measure(profiling, span, result, self._request_spans, self._decode)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        *,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        refused: Literal["raise", "mark"] = "raise",
        **template: Any,
    ) -> Completions:
        """`generate` for conversations of `{"role", "content"}` messages, through the tokenizer's chat template.

        `template` is handed on to `apply_chat_template`, as `tools` and `chat_template` are.
        """
        if self._tokenizer is None:
            raise TypeError("conversations need a tokenizer: construct with processing_class")
        settings = dict(tools=tools, chat_template=chat_template, add_generation_prompt=True, tokenize=True) | template
        rendered = [
            self._tokenizer.apply_chat_template(list(conversation), **settings | {"return_dict": True})["input_ids"]
            for conversation in conversations
        ]
        return self.generate(rendered, sampling, num_generations, refused=refused)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[list[float | None]]:
        """The log-probabilities that the engine's weights give to the tokens of each completion after its prompt.

        They are the model's own, at temperature 1: for distillation and for reference models.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: there must be one for each")
        starts = [self._ids(index, prompt) for index, prompt in enumerate(prompts)]
        whole = [[*start, *completion] for start, completion in zip(starts, completions, strict=True)]
        scored = self.generate(whole, Sampling(max_tokens=1, logprobs=None, prompt_logprobs=0))
        return [(found.prompt_logprobs or [])[len(start) :] for start, found in zip(starts, scored, strict=True)]

    def sync_weights(self, version: str | None = None) -> SyncReport:
        """Replace the engine's weights by the trainer model's, and label what is sampled from then on.

        `version` defaults to the number after the last one, or to the count of syncs where that was no
        number. When anything fails the engine's weights are unknown: it is `failed` and refuses to generate
        until a later sync succeeds.

        Raises:
            WeightSyncError: The weights did not arrive whole; names phase and parameter.
            EngineStateError: The engine is closed or busy, or its weights are asleep.
        """
        with self._exclusive("sync_weights"):
            if "weights" in self._asleep:
                raise EngineStateError("sync_weights", self._states.describe(), "call wake_up(['weights']) first")
            self._syncs += 1
            following = str(int(self._version) + 1) if self._version.isdecimal() else str(self._syncs)
            return self._sync(version if version is not None else following)

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
                self._level, start = f"level {level}", time.monotonic()
                self._states.move("sleep", EngineState.ASLEEP, self._level)
                with self._failing("sleep"):
                    report = self._engine.sleep(level)
                self._asleep = set(TAGS)
                self._stale = self._stale or (level == 2 and report.memory_freed)
                seconds = time.monotonic() - start
                own = {names.MEMORY_FREED: report.memory_freed, names.DEVICE_BYTES: report.device_bytes}
                span.set({**own, **self._memory()})
        return replace(report, seconds=seconds)

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
            start = time.monotonic()
            asked = [tag for tag in TAGS if tag in (tags or TAGS)]
            with self._profiling.span(names.WAKE_UP, {names.WAKE_TAGS: asked}) as span:
                self._states.move("wake_up", EngineState.WAKING, self._level)
                with self._failing("wake_up"):
                    report = self._engine.wake_up(asked)
                self._asleep -= set(asked)
                if self._asleep:
                    self._states.move("wake_up", EngineState.ASLEEP, self._level)
                else:
                    self._states.move("wake_up", EngineState.AWAKE)
                seconds = time.monotonic() - start
                own = {names.DEVICE_BYTES: report.device_bytes, names.RESTORED: self._stale or None}
                span.set({**own, **self._memory()})
        return replace(report, seconds=seconds)

    def close(self) -> None:
        """Shut the engine down. Twice does no harm; anything else afterwards raises `EngineStateError`."""
        if self._states.state is EngineState.CLOSED:
            return
        with self._busy:
            self._states.move("close", EngineState.CLOSED)
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    @contextmanager
    def _generating(self, call: str) -> Iterator[None]:
        """Have the engine to oneself, awake. Waits for another thread's generation, but not for its own."""
        if self._owner == threading.get_ident():
            raise EngineStateError(call, "at work in this thread", "finish or close the stream that is open")
        with self._busy:
            self._owner = threading.get_ident()
            try:
                self._states.require(call, EngineState.AWAKE)
                yield
            finally:
                self._owner = None

    def _decode(self, ids: list[int]) -> str:
        return str(ids) if self._tokenizer is None else self._tokenizer.decode(ids)

    def _ids(self, index: int, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            raise TypeError(f"prompt {index} is text: construct with processing_class to pass text")
        return list(self._tokenizer(prompt)["input_ids"])

    def _prepare(
        self, prompts: Sequence[Prompt], sampling: Sampling, num_generations: int, refused: Literal["raise", "mark"]
    ) -> _Job:
        """Check what is asked for, agree on it with the ranks that share the engine, see to its weights."""
        if num_generations < 1:
            raise ValueError(f"num_generations must be at least 1, got {num_generations}")
        if sampling.structured_outputs_regex is None and self._regex is not None:
            sampling = replace(sampling, structured_outputs_regex=self._regex)
        limit, vocabulary = self._engine.max_model_length - 1, self._engine.vocabulary_size
        encoded = [self._ids(index, prompt) for index, prompt in enumerate(prompts)]
        errors: dict[int, PromptError] = {}
        for index, ids in enumerate(encoded):
            if not ids:
                errors[index] = PromptError(index, "is empty")
            elif len(ids) > limit:
                problem = f"has {len(ids)} tokens; at most {limit} leave room for a completion"
                errors[index] = PromptError(index, problem, limit)
            elif min(ids) < 0 or max(ids) >= vocabulary:
                problem = f"holds a token id outside the vocabulary of {vocabulary}"
                errors[index] = PromptError(index, problem, vocabulary)
        # A rank that raised alone would leave the others waiting for it.
        raising: list[tuple[int, str, int | None]] = []
        if refused == "raise":
            raising = [(error.index, error.problem, error.limit) for error in errors.values()]
        everyones, _ = self._ranks.gather(raising)
        if everyones:
            index, problem, bound = (raising or everyones)[0]
            raise PromptError(index, problem, bound)
        if self._stale:
            self._sync(self._version)
        good = [index for index in range(len(prompts)) if index not in errors]
        gathered, start = self._ranks.gather([encoded[index] for index in good])
        requests = _requests(gathered, num_generations, sampling.seed)
        prompt_ids = [[] if index in errors else ids for index, ids in enumerate(encoded)]
        return _Job(prompt_ids, errors, good, start, requests, sampling, num_generations)

    def _sample(self, job: _Job, on_completion: Callable[[Completion], None] | None) -> list[Completion]:
        """All that the engine samples for `job`, other ranks' too, in any order."""
        done: list[Completion] = []
        try:
            with closing(self._engine.stream(job.requests, job.sampling, self._profiling.carrier())) as stream:
                for completion in stream:
                    done.append(completion)
                    if on_completion is not None and job.owns(completion):
                        on_completion(job.own(completion))
        except EngineError as error:
            self._states.move("generate", EngineState.FAILED, str(error))
            raise
        return done

    def _sync(self, version: str) -> SyncReport:
        source, profiling, start = self._source, self._profiling, time.monotonic()
        then, detail = (EngineState.ASLEEP, self._level) if self._asleep else (EngineState.AWAKE, "")
        own = {names.WEIGHT_VERSION: version, names.TRANSPORT: "reload", names.TRANSPORT_REASON: "in process"}
        with (
            profiling.span(names.WEIGHT_SYNC, own) as span,
            self._states.during("sync_weights", EngineState.SYNCING, then, detail),
            one_pass(source),
        ):
            self._engine.sync(source, version, self._phase)
            seconds = time.monotonic() - start
            report = SyncReport(version=version, bytes=source.bytes, tensors=source.tensors, seconds=seconds)
            own = {names.SYNC_BYTES: report.bytes, names.SYNC_TENSORS: report.tensors}
            span.set({**own, names.SYNC_RATE: report.bandwidth, **self._memory()})
        self._version, self._stale = version, False
        profiling.record(names.SYNCED_BYTES, report.bytes, **{names.TRANSPORT: "reload"})
        profiling.record(names.SYNC_BANDWIDTH, report.bandwidth, **{names.TRANSPORT: "reload"})
        return report

    @contextmanager
    def _phase(self, name: str) -> Generator[Span]:
        with self._profiling.span(f"{names.WEIGHT_SYNC}.{name}") as span, self._device.of(span):
            yield span

    def _memory(self) -> dict[str, int]:
        return memory() if self._profiling.enabled else {}


@dataclass(frozen=True, slots=True)
class _Job:
    """One call's prompts, and their place among those of the ranks that share the engine."""

    prompt_ids: list[list[int]]
    """Of this rank, empty for refused ones."""
    errors: dict[int, PromptError]
    good: list[int]
    """The places in `prompt_ids` of those that are not refused."""
    start: int
    """Where they begin among all ranks' prompts."""
    requests: list[Request]
    """Of all ranks."""
    sampling: Sampling
    num_generations: int

    def owns(self, completion: Completion) -> bool:
        """Whether what the engine has sampled is for this rank."""
        return 0 <= completion.prompt_index - self.start < len(self.good)

    def own(self, completion: Completion) -> Completion:
        """What the engine has sampled, under its prompt's place in the caller's list."""
        return replace(completion, prompt_index=self.good[completion.prompt_index - self.start])

    def place(self, sampled: list[Completion], version: str) -> Completions:
        """This rank's completions in prompt order, refused prompts marked; what has not been sampled is missing."""
        arrived = {(c.prompt_index, c.generation_index): c for c in map(self.own, filter(self.owns, sampled))}
        placed: list[Completion] = []
        for index in range(len(self.prompt_ids)):
            for generation in range(self.num_generations):
                if index in self.errors:
                    placed.append(
                        Completion(
                            prompt_index=index,
                            generation_index=generation,
                            token_ids=[],
                            finish_reason="error",
                            error=self.errors[index],
                        )
                    )
                elif (found := arrived.get((index, generation))) is not None:
                    placed.append(found)
        return Completions(self.prompt_ids, placed, self.num_generations, version)


class ColocateGeneration(Generation):
    """Generates with vLLM in the trainer's own process, from the trainer's own model.

        with ColocateGeneration(model, processing_class=tokenizer, profiling=profiling) as generation:
            rollouts = generation.generate(prompts, Sampling(max_tokens=512), num_generations=8)
            generation.sync_weights(version="step-1")

    Where the model's `name_or_path` names a checkpoint, vLLM starts from that; a model that was never
    saved is handed over before the first generation. Construction leaves random states, threads,
    environment and the default process group of the process as they were.

    Args:
        model: The trainer's model: a module with a `config`. It is read at every sync and never written.
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
        weight_version: What the weights are called until the first sync: a resumed run's own last version.
        profiling: Where spans and measurements go.
        engine_kwargs: Anything else that `vllm.LLM` takes, under its own name; goes before what is set above.

    Raises:
        EngineError: vLLM could not start.
        MissingExtraError: It is not installed.
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
        weight_version: str = "0",
        profiling: ProfilingContext = ProfilingContext.disabled(),
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        from .engines.checkpoint import checkpoint_of
        from .engines.colocate import ColocateEngine

        rank, world_size = _placement(accelerator)
        if world_size % tensor_parallel_size:
            raise ValueError(f"tensor_parallel_size {tensor_parallel_size} must divide the {world_size} ranks evenly")
        processing_class = processing_class or tokenizer
        checkpoint, source = checkpoint_of(model, processing_class), source_of(model)
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
                engine = ColocateEngine(checkpoint.path, **settings | dict(engine_kwargs or {}))
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
            weight_version=weight_version,
            profiling=profiling,
        )


class ServerGeneration(Generation):
    """Generates with one or more vLLM servers that hold the trainer's model.

        with ServerGeneration(model, base_urls=["http://a:8000", "http://b:8000"], profiling=profiling) as generation:
            rollouts = generation.generate(prompts, Sampling(max_tokens=512), num_generations=8)
            generation.sync_weights(version="step-1")

    Requests are spread over the servers by how fast they answer; what a lost server has not answered goes
    to the others. Closing ends the connections; the servers go on.

    Args:
        model: The trainer's model. It is read at every sync and never written.
        base_urls: Where the servers are; one may be a router in front of many. `host` and `port` name a single one.
        processing_class: The tokenizer or processor, for prompts given as text; `tokenizer` is the same.
        timeout: Seconds in which every call must be answered, a whole generation among them.
        api_key: What guards the servers' inference routes.
        control_key: What guards all others, where `vgen serve` started them.
        pause_mode: What becomes of requests in flight during a sync: `keep`, `wait` or `abort`.
        weights_folder: A folder that servers see too, for syncs by checkpoint. The system's temporary one by default.
        request_timing: Whether each completion's timing is asked for, which takes a call for each.
        structured_outputs_regex: What completions must match, where a `Sampling` says nothing itself.
        request_spans: How many requests of a call, the slowest ones, become spans; all are in the metrics.
        weight_version: What the weights are called until the first sync: a resumed run's own last version.
        profiling: Where spans and measurements go.

    Raises:
        ServerError: A server cannot be reached, or refuses the keys.
        EngineError: It is no vLLM server, or holds another model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        base_urls: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 8000,
        processing_class: Any = None,
        tokenizer: Any = None,
        timeout: float = 600.0,
        api_key: str | None = None,
        control_key: str | None = None,
        pause_mode: Literal["keep", "wait", "abort"] = "keep",
        weights_folder: str | None = None,
        request_timing: bool = True,
        structured_outputs_regex: str | None = None,
        request_spans: int = 8,
        weight_version: str = "0",
        profiling: ProfilingContext = ProfilingContext.disabled(),
    ) -> None:
        from .engines.http import Server
        from .engines.server import ServerEngine

        urls = [base_urls] if isinstance(base_urls, str) else list(base_urls) or [f"http://{host}:{port}"]
        servers = [Server(url, api_key=api_key, control_key=control_key, timeout=timeout) for url in urls]
        config: Any = unwrapped(model).config
        with profiling.span(names.ENGINE_INIT, {names.ENGINE: ServerEngine.kind}) as span:
            engine = ServerEngine(
                servers,
                vocabulary_size=getattr(config.get_text_config(), "vocab_size", None),
                request_timing=request_timing,
                pause_mode=pause_mode,
                folder=weights_folder,
            )
            span.set({names.DEVICE: engine.device_type, names.MODEL: engine.model})
        super().__init__(
            engine,
            source_of(model),
            tokenizer=processing_class or tokenizer,
            structured_outputs_regex=structured_outputs_regex,
            request_spans=request_spans,
            weight_version=weight_version,
            profiling=profiling,
        )


def _requests(prompts: list[list[int]], num_generations: int, seed: int | None) -> list[Request]:
    return [
        Request(index, generation, ids, None if seed is None else seed + index * num_generations + generation)
        for index, ids in enumerate(prompts)
        for generation in range(num_generations)
    ]


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
