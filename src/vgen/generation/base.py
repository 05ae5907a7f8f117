"""What every generation object does: an engine, the trainer's weights and a profiling context, composed."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

from ..engines.base import Cancellation, Engine, EngineState, PauseMode, Source, StateMachine, Verify
from ..errors import EngineError, EngineStateError, PromptError, VgenError
from ..profiling import ProfilingContext, Span, names
from ..profiling.device import DeviceTimer, memory
from ..profiling.rollouts import counts, measure
from ..ranks import Call, Ranks, SingleRank
from ..types import Completion, Completions, LoRARequest, Prompt, Sampling, SleepReport, SyncReport
from .chat import Chat
from .job import Job, Options, make_requests
from .memory import Leaks, memory_attributes
from .progress import progress_bar
from .prompts import Encoder
from .stall import STALL_SECONDS, StallWatch, Work
from .states import gauges_of
from .syncs import PhaseTrace, Syncs
from .traced import Traced

TAGS = ("weights", "kv_cache")
"""What sleeping gives back and `wake_up` takes again, under vLLM's names."""


AGENERATE_THREADS = 1024
"""How many calls of `agenerate` may wait for servers at a time; a thread is made only where it is needed."""
SYNC_SECONDS = 600.0
"""How long a generation waits for a weight sync that is under way."""


class Generation:
    """Generates with an engine that it is given, keeps its weights in step with a source, and guards its state.

    The generation classes differ in the engine they make. With an engine in this process it is one call at a
    time: `generate` waits for another thread's `generate`, all else is refused with `EngineStateError`. With
    servers, any number of threads may generate, also while the weights are replaced.

    Args:
        engine: What generates. It is closed with this object.
        source: The trainer's weights: re-iterable, with `bytes`, `tensors` and `seconds` of the last pass.
        tokenizer: A tokenizer or processor, for prompts given as text.
        ranks: The trainer ranks that share the engine.
        stale: Whether the engine has no weights of the trainer's yet: they are brought before the first token.
        sleep_mode: Whether `sleep` may be called.
        structured_outputs_regex: What completions must match, where a `Sampling` says nothing itself.
        request_spans: How many requests of a call, the slowest ones, become spans; all are in the metrics.
        traced_requests: How many requests of a call, random ones, are traced from their dispatch, the engine's own
            span beneath theirs; or a function of the step's number, for chosen steps.
        stall_seconds: After how long without a token, a completion or a phase a call counts as stalled, which is
            logged and shown while it lasts; None for never.
        show_progress: Whether long calls show a progress bar on a terminal.
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
        traced_requests: int | Callable[[int | None], int] = 2,
        stall_seconds: float | None = STALL_SECONDS,
        show_progress: bool = False,
        weight_version: str = "0",
        profiling: ProfilingContext = ProfilingContext.disabled(),
    ) -> None:
        self._engine, self._source, self._ranks = engine, source, ranks or SingleRank()
        self._processor, self._encoder = tokenizer, Encoder(engine, tokenizer)
        self._regex, self._request_spans, self._sleep_mode = structured_outputs_regex, request_spans, sleep_mode
        self._traced_requests, self._show_progress = traced_requests, show_progress
        self._profiling = profiling.bind({names.ENGINE: engine.kind})
        self._device = DeviceTimer(self._profiling)
        self._states, self._busy = StateMachine(), threading.Lock()
        self._owner: int | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._asleep, self._level = set[str](), ""
        self._stale, self._syncs, self._version = stale, 0, weight_version
        self._states.move("construction", EngineState.AWAKE)
        gauges = gauges_of(self._states, self._profiling)
        self._leaks = Leaks(self._profiling)
        self._made = Syncs()
        self._watch = StallWatch(self._profiling, gauges, stall_seconds)
        weakref.finalize(self, self._watch.close)

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
        images: Sequence[Sequence[Any] | None] | None = None,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        refused: Literal["raise", "mark"] = "raise",
        on_completion: Callable[[Completion], None] | None = None,
    ) -> Completions:
        """Sample `num_generations` completions of each prompt.

        Prompts are token ids, or text where a tokenizer was given. `images` holds each prompt's, as `PIL.Image`s,
        one for each placeholder in the prompt; where a processor was given, ids with its expanded placeholders are
        as good. Completions come back in prompt order; `on_completion` is called,
        in this thread, with each as it is done.

        Several ranks that share engines generate together: all call it, each with prompts of its own or none, with
        the same options, and get their own completions; where a rank has no engine, all at once. What one raises is
        raised on all.

        Raises:
            PromptError: A prompt is empty, too long, holds an unknown id, or was refused by the engine. With
                `refused="mark"` the others are generated, and its completions carry the error.
            EngineStateError: The engine is asleep, failed or closed.
            EngineError: The engine broke; it is `failed` now.
            RankError: Another rank went away, or did not come in time.
        """
        return self._generate(
            Cancellation(),
            prompts,
            sampling,
            num_generations,
            images=images,
            lora_request=lora_request,
            priority=priority,
            refused=refused,
            on_completion=on_completion,
        )

    def _generate(
        self,
        cancellation: Cancellation,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        num_generations: int,
        *,
        images: Sequence[Sequence[Any] | None] | None = None,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        refused: Literal["raise", "mark"] = "raise",
        on_completion: Callable[[Completion], None] | None = None,
    ) -> Completions:
        options = Options(sampling, num_generations, lora_request, priority, cancellation)
        with self._ranks.call("generate") as call, self._generating("generate"):
            own = {names.PROMPTS: len(prompts), names.NUM_GENERATIONS: num_generations}
            with self._profiling.span(names.GENERATE, own) as span, self._watch.watching("generate", span) as work:
                job = self._prepare(call, prompts, images, options, refused)
                version = self._version
                span.set({names.WEIGHT_VERSION: version, names.REFUSED: len(job.errors) or None})
                self._made.link(span, version)
                with (
                    self._profiling.span(names.ENGINE_GENERATE) as engine_span,
                    work.within(engine_span),
                    self._traced(job, engine_span) as traced,
                ):
                    sampled = self._sample(call, job, traced, work, on_completion)
                sampled = call.scatter(sampled)
                if on_completion is not None and not self._ranks.leading:
                    for completion in sampled:
                        on_completion(job.own(completion))
                with self._profiling.span(names.DECODE_OUTPUTS):
                    result = job.place(sampled, version)
                if (
                    refused == "raise"
                    and (error := next((c.error for c in result if c.error), call.refused)) is not None
                ):
                    raise error  # what only the engine could tell
                if self._profiling.enabled:
                    span.set(counts(result))
                    self._made.link_later(span, version, result)
                    measure(self._profiling, engine_span, result, self._request_spans, traced.own, self._encoder.decode)
                return result

    async def agenerate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        *,
        on_completion: Callable[[Completion], None] | None = None,
        **options: Any,
    ) -> Completions:
        """`generate` for asynchronous trainers, with the same options: on a thread of its own, beneath the open span.

        `on_completion` is called on that thread. Cancelling aborts what is not done yet. Ranks that share engines
        begin such calls in the same order.
        """
        import asyncio

        cancellation = Cancellation()
        call = partial(self._generate, cancellation, on_completion=on_completion, **options)
        work = partial(copy_context().run, call, prompts, sampling, num_generations)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads(), work)
        except asyncio.CancelledError:
            cancellation.cancel()
            raise

    def _threads(self) -> Executor:
        """Whose threads wait for `agenerate`; asyncio's own are too few for a trainer with hundreds of rollouts."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(AGENERATE_THREADS, "vgen-generate")
        return self._executor

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        *,
        images: Sequence[Sequence[Any] | None] | None = None,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        refused: Literal["raise", "mark"] = "raise",
    ) -> Generator[Completion]:
        """Yield each completion as it is done, so that rewards can start; raises as `generate` does.

        Leaving the loop early aborts the rest. With an engine in this process the engine is taken until the
        stream has ended: other calls of this thread are refused. Its span is recorded at the end, and covers
        what the caller did between two completions.
        """
        if not isinstance(self._ranks, SingleRank):
            raise ValueError("stream() serves one rank; ranks that share an engine call generate() together")
        profiling, options = self._profiling, Options(sampling, num_generations, lora_request, priority)
        with self._generating("stream"):
            own = {names.PROMPTS: len(prompts), names.NUM_GENERATIONS: num_generations}
            span, done, error = profiling.detached(names.GENERATE, own), dict[tuple[int, int], Completion](), None
            job, version, own_traced = None, self._version, set[tuple[int | None, int]]()
            try:
                job = self._prepare(self._ranks, prompts, images, options, refused)
                yield from (completion for completion in job.place([], self._version) if completion.error is not None)
                version = self._version
                self._made.link(span, version)
                with (
                    self._watch.watching("stream", span, generator=True) as work,
                    self._traced(job, span) as traced,
                    closing(self._engine.stream(replace(traced.batch(), moved=work.moved))) as stream,
                ):
                    own_traced = traced.own
                    for completion in stream:
                        done[completion.prompt_index, completion.generation_index] = completion
                        traced.finish(completion)
                        if completion.error is not None and refused == "raise":
                            raise job.error_of(completion)
                        with work.rest():
                            yield job.own(completion)
            except BaseException as raised:
                error = type(raised).__name__
                if isinstance(raised, EngineError):
                    self._broken("stream", raised)
                raise
            finally:
                if profiling.enabled:
                    if job is not None:
                        result = job.place(done.values(), version)
                        span.set({names.WEIGHT_VERSION: version, **counts(result)})
                        self._made.link_later(span, version, result)
                        measure(profiling, span, result, self._request_spans, own_traced, self._encoder.decode)
                    profiling.finish(span, error)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        *,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Completions:
        """`generate` for conversations of `{"role", "content"}` messages, through the chat template.

        `tools`, `chat_template` and `chat_template_kwargs` go to the `apply_chat_template` of the processor or
        tokenizer, `options` to `generate`. A message's content may be a list of parts, images among them, each a
        `PIL.Image` or a `data:` URI; or they stand in `images`, one for each part of type `image`.
        """
        if self._processor is None:
            raise TypeError("conversations need a tokenizer: construct with processing_class")
        settings: dict[str, Any] = {"chat_template": chat_template, "tools": tools, **(chat_template_kwargs or {})}
        chat = Chat(self._processor, {name: value for name, value in settings.items() if value is not None})
        prompts: list[Any] = []
        images: list[list[Any]] = []
        for index, conversation in enumerate(conversations):
            try:
                ids, found = chat.render(index, conversation)
            except PromptError as error:  # of this one alone: `generate` raises or marks it
                ids, found = error, []
            prompts.append(ids)
            images.append(found)
        if any(images):
            if options.get("images") is not None:
                raise ValueError("images are in the conversations and in images=: pass them one way")
            options["images"] = images
        return self.generate(prompts, sampling, num_generations, **options)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], **options: Any
    ) -> list[list[float | None]]:
        """The log-probabilities that the engine's weights give to the tokens of each completion after its prompt.

        They are the model's own, at temperature 1: for distillation and for reference models. None for a NaN.
        `options` go to `generate`: `images`, `lora_request`, `priority`.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: there must be one for each")
        whole = [[*self._encoder.ids(i, prompt), *completions[i]] for i, prompt in enumerate(prompts)]
        scored = self.generate(whole, Sampling(max_tokens=1, logprobs=None, prompt_logprobs=0), **options)
        # From the end: images have made the prompt longer.
        found = [completion.prompt_logprobs or [] for completion in scored]
        return [own[len(own) - len(ids) :] for own, ids in zip(found, completions, strict=True)]

    def sync_weights(self, version: str | None = None, *, verify: Verify | None = None) -> SyncReport:
        """Replace the engine's weights by the trainer model's, and label what is sampled from then on.

        `version` defaults to the number after the last one, or to the count of syncs where that was no
        number. Unless told otherwise, the first sync to an engine, and the first after one that failed, is verified
        by log-probabilities: what it gives to the tokens of one prompt, and what the trainer's model does; while it
        sleeps or is paused, as soon as it is awake. `verify="logprobs"` does so again; `"bits"` compares every
        destination with its source, where the engine copies by a record, else log-probabilities; `"none"` trusts.

        When anything fails the engine's weights are unknown: it is `failed` and refuses to generate until a later
        sync succeeds.

        Raises:
            WeightSyncError: The weights did not arrive whole, or differ; names phase and parameter.
            ValueError: The engine cannot be verified so.
            EngineStateError: The engine is closed or busy, or its weights are asleep.
        """
        if verify is not None and verify not in (known := self._engine.verifications):
            raise ValueError(f"verify must be one of {', '.join(known)} with this engine, got {verify!r}")
        with self._exclusive("sync_weights"):
            if "weights" in self._asleep:
                raise EngineStateError("sync_weights", self._states.describe(), "call wake_up(['weights']) first")
            self._syncs += 1
            following = str(int(self._version) + 1) if self._version.isdecimal() else str(self._syncs)
            return self._sync(version if version is not None else following, verify)

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
            own = {names.SLEEP_LEVEL: level}
            with self._profiling.span(names.SLEEP, own) as span, self._watch.watching("sleep", span):
                self._level, start = f"level {level}", time.monotonic()
                with self._failing("sleep"):
                    self._states.move("sleep", EngineState.ASLEEP, self._level)
                    report = self._engine.sleep(level)
                self._asleep = set(TAGS)
                self._stale = self._stale or (level == 2 and report.memory_freed)
                seconds = time.monotonic() - start
                leaked = {names.LEAKED: self._leaks.note(level, report.device_in_use)}
                span.set({**memory_attributes(report), **leaked, **self._memory()})
                self._profiling.record(names.SLEEP_FREED, max(report.device_bytes or 0, 0), **own)
        return replace(report, seconds=seconds)

    def wake_up(self, tags: Sequence[str] | None = None) -> SleepReport:
        """Take memory again: `["weights"]`, `["kv_cache"]`, or both when None. Awake once both are back.

        After a level-2 sleep the weights are restored from the trainer's model before the first token,
        unless `sync_weights` has brought them first. Where those were to be verified, they are now: by what the
        trainer's model said when they left.

        Raises:
            EngineStateError: The engine is not asleep.
            WeightSyncError: The weights that came while it was asleep are wrong.
        """
        for tag in tags or ():
            if tag not in TAGS:
                raise ValueError(f"tags must be among {', '.join(TAGS)}, got {tag!r}")
        with self._exclusive("wake_up"):
            self._states.require("wake_up", EngineState.ASLEEP)
            start = time.monotonic()
            asked = [tag for tag in TAGS if tag in (tags or TAGS)]
            own = {names.WAKE_TAGS: asked, names.SLEEP_LEVEL: int(self._level.removeprefix("level "))}
            with self._profiling.span(names.WAKE_UP, own) as span, self._watch.watching("wake_up", span) as work:
                with self._failing("wake_up"):
                    self._states.move("wake_up", EngineState.WAKING, self._level)
                    report = self._engine.wake_up(asked)
                    self._asleep -= set(asked)
                    if not self._asleep:
                        self._engine.verify(PhaseTrace(self._profiling, self._device, span, work))
                if self._asleep:
                    self._states.move("wake_up", EngineState.ASLEEP, self._level)
                else:
                    self._states.move("wake_up", EngineState.AWAKE)
                seconds = time.monotonic() - start
                restored = {names.RESTORED: self._stale or None}
                span.set({**memory_attributes(report), **restored, **self._memory()})
                self._profiling.record(names.WAKE_TAKEN, max(report.device_bytes or 0, 0))
        return replace(report, seconds=seconds)

    def pause(self, mode: PauseMode = "keep") -> None:
        """Stop scheduling until `resume`. Requests in flight are aborted, waited for, or kept to go on later.

        Raises:
            EngineStateError: The engine is not awake.
        """
        with self._exclusive("pause"):
            self._states.require("pause", EngineState.AWAKE)
            own = {names.PAUSE_MODE: mode}
            with self._profiling.span(names.PAUSE, own) as span, self._calling("pause", span):
                self._engine.pause(mode)
                self._states.move("pause", EngineState.PAUSED)

    def resume(self) -> None:
        """Schedule again after `pause`.

        Raises:
            EngineStateError: The engine is not paused.
            WeightSyncError: The weights that came meanwhile are wrong.
        """
        with self._exclusive("resume"):
            self._states.require("resume", EngineState.PAUSED)
            with self._profiling.span(names.RESUME) as span, self._calling("resume", span) as work:
                self._engine.resume()
                self._engine.verify(PhaseTrace(self._profiling, self._device, span, work))
                self._states.move("resume", EngineState.AWAKE)

    def close(self) -> None:
        """Shut the engine down. Twice does no harm; anything else afterwards raises `EngineStateError`."""
        if self._states.state is EngineState.CLOSED:
            return
        with (
            self._busy,
            self._profiling.span(names.ENGINE_CLOSE) as span,
            self._watch.watching("close", span),
        ):
            self._states.move("close", EngineState.CLOSED)
            if self._executor is not None:
                self._executor.shutdown(wait=False)
            self._engine.close()
        self._watch.close()

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
    def _calling(self, call: str, span: Span) -> Iterator[Work]:
        """Watch a call to the engine; whatever is raised within leaves it failed."""
        with self._watch.watching(call, span) as work, self._failing(call):
            yield work

    @contextmanager
    def _failing(self, call: str) -> Iterator[None]:
        """Whatever is raised within leaves the engine failed, unless the engine has refused and changed nothing."""
        found = self._states.state, self._states.detail
        try:
            yield
        except EngineStateError:
            self._states.back(*found)
            raise
        except BaseException as error:
            self._states.fail(call, f"{call} raised {type(error).__name__}")
            if isinstance(error, VgenError) or not isinstance(error, Exception):
                raise
            raise EngineError(f"the engine failed in {call}: {type(error).__name__}") from error

    @contextmanager
    def _generating(self, call: str) -> Iterator[None]:
        """Have the engine, awake: to oneself, unless it is concurrent; then a sync that is under way is waited for.

        Waits for another thread's generation, but not for its own.
        """
        if self._engine.concurrent:
            self._states.wait_while(EngineState.SYNCING, SYNC_SECONDS)
            self._states.require(call, EngineState.AWAKE)
            yield
            return
        if self._owner == threading.get_ident():
            raise EngineStateError(call, "at work in this thread", "finish or close the stream that is open")
        with self._busy:
            self._owner = threading.get_ident()
            try:
                self._states.require(call, EngineState.AWAKE)
                yield
            finally:
                self._owner = None

    def _prepare(
        self,
        call: Call,
        prompts: Sequence[Prompt],
        images: Sequence[Sequence[Any] | None] | None,
        options: Options,
        refused: Literal["raise", "mark"],
    ) -> Job:
        """Check what is asked for, agree on it with the ranks that share the engine, see to its weights."""
        if options.num_generations < 1:
            raise ValueError(f"num_generations must be at least 1, got {options.num_generations}")
        if images is not None and len(images) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and images for {len(images)}: there must be a list for each")
        if options.sampling.structured_outputs is None and self._regex is not None:
            sampling = replace(options.sampling, structured_outputs={"regex": self._regex})
            options = replace(options, sampling=sampling)
        encoded, placed, errors = self._encoder.encode(prompts, images)
        if refused == "raise":
            for error in errors.values():
                raise error
        good = [index for index in range(len(prompts)) if index not in errors]
        mine = [(placed[index], tuple(images[index] or ()) if images is not None else ()) for index in good]
        gathered, start = call.gather(mine, options.terms())
        if self._stale:
            self._freshen()
        requests = make_requests(gathered, options.num_generations, options.sampling.seed)
        prompt_ids = [[] if index in errors else ids for index, ids in enumerate(encoded)]
        return Job(prompt_ids, errors, good, start, requests, options)

    def _freshen(self) -> None:
        """Bring the trainer's weights before the first token. Of calls that come together, one does."""
        with self._busy if self._engine.concurrent else nullcontext():
            if self._stale:
                self._states.require("generate", EngineState.AWAKE)  # the one that did may have failed
                self._sync(self._version)

    def _sample(
        self, call: Call, job: Job, traced: Traced, work: Work, on_completion: Callable[[Completion], None] | None
    ) -> list[Completion]:
        """All that this rank's engine samples for `job`, other ranks' too, in any order."""

        def sample() -> list[Completion]:
            batch = replace(traced.batch(), moved=work.moved)
            done: list[Completion] = []
            with ExitStack() as stack:
                advance = stack.enter_context(progress_bar(len(job.requests), enabled=self._show_progress))
                for completion in stack.enter_context(closing(self._engine.stream(batch))):
                    work.moved()
                    done.append(completion)
                    traced.finish(completion)
                    advance(len(completion.token_ids))
                    call.alive()
                    if on_completion is not None and completion.error is None and job.owns(completion):
                        on_completion(job.own(completion))
            return done

        try:
            if self._ranks.leading:
                return call.lead(sample)
            with work.rest():  # the leader sees to it
                return call.lead(sample)
        except EngineError as error:
            self._broken("generate", error)
            raise

    def _broken(self, call: str, error: EngineError) -> None:
        """An engine in this process that broke is failed; servers are known one by one, and some may still be well."""
        if not self._engine.concurrent:
            self._states.fail(call, str(error))

    def _traced(self, job: Job, parent: Span) -> Traced:
        """The requests of `job` that are traced from here on, beneath `parent`."""
        count = self._traced_requests
        if not isinstance(count, int):
            count = count(None if parent.step is None else parent.step.number)
        return Traced(self._profiling, parent, job, count, self._encoder.decode)

    def _sync(self, version: str, verify: Verify | None = None) -> SyncReport:
        source, profiling, start = self._source, self._profiling, time.monotonic()
        then, detail = (EngineState.ASLEEP, self._level) if self._asleep else (EngineState.AWAKE, "")
        if self._states.state is EngineState.PAUSED:
            then = EngineState.PAUSED
        with (
            profiling.span(names.WEIGHT_SYNC, {names.WEIGHT_VERSION: version}) as span,
            self._watch.watching("sync_weights", span) as work,
            self._states.during("sync_weights", EngineState.SYNCING, then, detail),
        ):
            trace = PhaseTrace(profiling, self._device, span, work)
            self._engine.sync(source, version, trace, verify)
            seconds = time.monotonic() - start
            sent, tensors = (source.bytes, source.tensors) if self._ranks.leading else (0, 0)
            report = SyncReport(version=version, bytes=sent, tensors=tensors, seconds=seconds)
            own = {names.SYNC_BYTES: report.bytes, names.SYNC_TENSORS: report.tensors}
            span.set({**own, names.SYNC_RATE: report.bandwidth, **self._memory()})
            self._version, self._stale = version, False
            self._made.add(span, version)
        if self._ranks.leading:
            transport = {names.TRANSPORT: span.attributes.get(names.TRANSPORT)}
            profiling.record(names.SYNCED_BYTES, report.bytes, **transport)
            profiling.record(names.SYNC_BANDWIDTH, report.bandwidth, **transport)
        return report

    def _memory(self) -> dict[str, int]:
        if not self._profiling.enabled:
            return {}
        found = memory()
        for instrument in (names.MEMORY_USED, names.MEMORY_RESIDENT):
            if instrument.name in found:
                self._profiling.record(instrument, found[instrument.name])
        return found
