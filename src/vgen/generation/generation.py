"""What every generation class does: an engine, the trainer's weights and a profiling context behind one object."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, Self, Unpack

from ..arguments import checked_call
from ..distributed.ranks import Ranks, SingleRank
from ..engine_protocol import Engine, EngineState, HowVerified, PauseMode, Source, Verify
from ..profiling import ProfilingContext, semconv
from ..types import Completion, Completions, LoRARequest, Prompt, Sampling, SleepReport, SyncReport, WeightVerification
from ..weights.source.module_source import NamedTensors, source_of
from .call_plan import CallOptions, CallRequest, Images, Refused
from .call_runner import CallRunner, OnCompletion
from .call_threads import CallThreads
from .chat import Chat
from .drift import DriftMonitor
from .lifecycle import Lifecycle
from .nan_logprobs import NanLogprobs
from .options import RequestTracing, profiling_context
from .prompts import Encoder
from .scoring import score
from .stalls import STALL_SECONDS
from .weight_sync import Frozen, WeightSync, version_name


class Generation:
    """Generates with any engine, keeps its weights in step with a source, and guards its state.

    `ColocateGeneration` and `ServerGeneration` make the engine themselves. Use this class with an engine of your own,
    or in tests with `vgen.testing.FakeEngine`.

    With an engine in this process one call runs at a time: `generate` waits for another thread's `generate`, every
    other call raises `EngineStateError` if the engine is in use. With servers, any number of threads may generate, also
    while the weights are replaced.

    Args:
        engine: The engine. `close` closes it.
        source: The trainer's weights: a `Source`, or anything that `vgen.weights.source_of` accepts, such as a list of
            `(name, tensor)`. None for a frozen engine, whose weights stay those of its checkpoint.
        processing_class: A tokenizer or processor. Needed for prompts given as text, and for `chat`.
        ranks: The trainer ranks that share the engine. By default this process alone.
        stale: Whether the engine lacks the trainer's weights, so that the first generation must sync them.
        sleep_mode: Whether `sleep` may be called.
        structured_outputs_regex: A regular expression that completions must match, if their `Sampling` has no
            `structured_outputs`.
        request_tracing: Which requests of a call become spans.
        stall_seconds: After how many seconds without a token, a completion or a phase a call counts as stalled, which
            is logged and shown while it lasts. None turns this off.
        show_progress: Whether long calls show a progress bar on a terminal.
        drift_every: After how many syncs each the next `generate` compares a completion's log-probabilities with the
            trainer's model, as the metric `vgen.weight_sync.drift`. None turns this off.
        weight_version: The version of the weights before the first sync. A resumed run passes its last version.
        profiling: Receives spans and measurements. By default nothing is recorded.
    """

    @checked_call
    def __init__(
        self,
        engine: Engine,
        source: Source | NamedTensors | None,
        *,
        processing_class: Any = None,
        ranks: Ranks | None = None,
        stale: bool = False,
        sleep_mode: bool = True,
        structured_outputs_regex: str | None = None,
        request_tracing: RequestTracing = RequestTracing(),
        stall_seconds: float | None = STALL_SECONDS,
        show_progress: bool = False,
        drift_every: int | None = None,
        weight_version: str | int = "0",
        profiling: ProfilingContext = ProfilingContext.disabled(),
    ) -> None:
        ranks, profiling = ranks or SingleRank(), profiling_context(profiling)
        self._alone = isinstance(ranks, SingleRank)
        profiling = profiling.bind({semconv.ENGINE: engine.kind})
        self._engine, self._processor, self._encoder = engine, processing_class, Encoder(engine, processing_class)
        self._threads = CallThreads()
        self._lifecycle = Lifecycle(engine, profiling, stale=stale, sleep_mode=sleep_mode, stall_seconds=stall_seconds)
        weights = Frozen() if source is None else source_of(source)
        self._weights = WeightSync(
            engine, weights, self._lifecycle, profiling, ranks.leading, version_name(weight_version)
        )
        parts = engine, self._encoder, ranks, self._lifecycle, self._weights, profiling
        self._drift = DriftMonitor(profiling, self._weights, drift_every)
        observers = NanLogprobs(profiling), self._drift
        self._calls = CallRunner(*parts, request_tracing, structured_outputs_regex, show_progress, *observers)

    @property
    def state(self) -> EngineState:
        """What the engine is doing."""
        return self._lifecycle.states.state

    @property
    def stalled_seconds(self) -> float:
        """Seconds without progress of the call that has been stalled longest; 0 if no call has stalled."""
        return self._lifecycle.watch.stalled_seconds()

    @property
    def weight_version(self) -> str:
        """The version given to the last sync; before the first sync, the one given to the constructor."""
        return self._weights.version

    @property
    def source(self) -> Source:
        """The trainer's weights. Assign another source to sync from that one, for example to test a failing sync.

        To assign one to a frozen engine raises `EngineStateError`.
        """
        return self._weights.source

    @source.setter
    def source(self, source: Source) -> None:
        self._weights.require_trainer("assigning a source")
        self._weights.source = source_of(source)

    @property
    def engine(self) -> Any:
        """The engine, for what this class does not cover. `engine.llm` of a colocated one is the `vllm.LLM`."""
        return self._engine

    @property
    def max_model_length(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self._engine.max_model_length

    @checked_call
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        *,
        images: Images = None,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        refused: Refused = "raise",
        on_completion: OnCompletion = None,
    ) -> Completions:
        """Sample `num_generations` completions of each prompt. They are returned in prompt order.

        Ranks that share an engine generate together: all of them make the call with the same options, each with its own
        prompts or none, and each receives its own completions. If any rank fails, all ranks raise.

        Args:
            prompts: Token ids; or text, if the constructor got a `processing_class`.
            sampling: How to sample. Its seed, if any, is the seed of the first completion.
            num_generations: Completions for each prompt, at least 1.
            images: For each prompt a list of `PIL.Image`s, one for each image placeholder in the prompt. If the
                constructor got a processor, prompts may also hold the placeholders as the processor expanded them.
            lora_request: A LoRA adapter to generate with.
            priority: Lower values run earlier, if the engine's scheduling policy is `priority`.
            refused: What to do about prompts that cannot be generated from: `raise` the first `PromptError`, or `mark`
                their completions with it (`Completion.error`) and generate the others.
            on_completion: Called with each completion as soon as it is done, in this thread.

        Raises:
            PromptError: A prompt is empty, too long, has a token id outside the vocabulary, or the engine refused it.
            EngineStateError: The engine is asleep, paused, failed or closed.
            EngineError: The engine broke, and is `failed` now.
            RankError: Another rank is gone, or did not make the call in time.
        """
        request = CallRequest.of(prompts, sampling, num_generations, images, lora_request, priority, refused)
        return self._calls.generate(request, on_completion)

    @checked_call
    async def agenerate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        *,
        on_completion: OnCompletion = None,
        **options: Unpack[CallOptions],
    ) -> Completions:
        """`generate` for asynchronous trainers, in a thread. The open span is the parent of its spans.

        `options` are those of `generate`. `on_completion` is called in the thread. Cancelling the task aborts the
        requests that are not done. Ranks that share an engine must begin such calls in the same order.
        """
        request = CallRequest.of(prompts, sampling, num_generations, **options)
        return await self._threads.run(partial(self._calls.generate, request, on_completion), request.cancellation)

    @checked_call
    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        num_generations: int = 1,
        **options: Unpack[CallOptions],
    ) -> Generator[Completion]:
        """Yield each completion as soon as it is done. Arguments (except `on_completion`) and errors are those of
        `generate`.

        Leaving the loop early aborts the rest. An engine in this process is reserved until the stream ends, so other
        calls of this thread raise `EngineStateError`. The span is recorded at the end; it includes the time that the
        caller spent between two completions. Ranks that share an engine cannot stream: `ValueError`.
        """
        return self._calls.stream(CallRequest.of(prompts, sampling, num_generations, **options))

    @checked_call
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

        `tools`, `chat_template` and `chat_template_kwargs` go to `apply_chat_template` of the processor or tokenizer,
        `options` to `generate`. A message's content may be a list of parts. An image part holds a `PIL.Image` or a
        `data:` URI; or pass the images in `images`, one for each part of type `image`.
        """
        settings = {"chat_template": chat_template, "tools": tools, **(chat_template_kwargs or {})}
        chat = Chat(self._processor, settings, self._encoder.rendered)
        prompts, options["images"] = chat.render_all(conversations, options.get("images"))
        return self.generate(prompts, sampling, num_generations, **options)

    @checked_call
    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]] | Completions, **options: Any
    ) -> list[list[float | None]]:
        """The log-probability that the engine's model gives to each token of each completion, after its prompt.

        `completions` are token ids, one list for each prompt, or what `generate` returned for as many prompts. The
        values are the model's own, at temperature 1; None stands for NaN. Use it for reference models and distillation.
        `options` go to `generate`: `images`, `lora_request`, `priority`.
        """
        context = self.max_model_length if self._alone else None
        return score(self.generate, self._encoder, context, prompts, completions, options)

    @checked_call
    def sync_weights(self, version: str | int | None = None, *, verify: Verify | None = None) -> SyncReport:
        """Replace the engine's weights by those of the trainer's model.

        If anything fails, the engine's weights are unknown: it is `failed`, and refuses to generate until a later sync
        succeeds.

        Args:
            version: The name of the new weights, or a number; completions carry it. By default the number after the
                last version, or the count of syncs if that was no number.
            verify: `logprobs` compares the log-probabilities that engine and trainer's model give to the tokens of one
                prompt; if the engine is asleep or paused, as soon as it is awake. `bits` compares every element in the
                engine with its source if the engine copies by a record of its loader, else it is `logprobs`. `none`
                does neither. By default `logprobs` verifies an engine's first sync, the first one after its first sleep
                of each level, after a failed sync or one that could not be verified, and when the trainer's model has
                new forward hooks.

        Raises:
            WeightSyncError: The weights did not arrive whole, or differ. It names the phase and the parameter.
            ValueError: This engine does not support that `verify`: stock servers do not support `bits`.
            EngineStateError: The engine is closed, in use or frozen, or its weights are asleep.
        """
        return self._weights.sync(None if version is None else version_name(version), verify)

    def record_drift(self, logprobs: Sequence[float | None], model_logprobs: Sequence[float]) -> None:
        """Record how far the engine's log-probabilities are from those that the trainer computed anyway.

        Both are of the same tokens, in nats, and of the same distribution: at the same temperature, without `top_p` and
        its kind. Each absolute difference goes into the metric `vgen.weight_sync.drift`. Raises `ValueError` if there
        are not as many of one as of the other.
        """
        self._drift.record(logprobs, model_logprobs)

    def verify(self, how: HowVerified = "logprobs") -> WeightVerification:
        """Prove that the engine has the weights of the trainer's model as it is now, without a sync.

        Ranks that share an engine or a sharded model make the call together. The engine's state stays as it is, also
        after an error: the weights may be stale only because training went on.

        Args:
            how: `logprobs` compares the log-probabilities of one prompt, and of a few decoded tokens. `bits` compares
                every element with its source if the engine in this process was loaded by a record, else it is
                `logprobs`, and the report says why.

        Raises:
            WeightSyncError: In phase `verify`: they differ, or cannot be compared.
            EngineStateError: The engine is asleep, paused, failed or closed, is in use, or has no trainer's model.
            ValueError: This engine cannot verify in that way.
        """
        return self._weights.verify(how)

    def sleep(self, level: int = 1, *, wait_seconds: float | None = None) -> SleepReport:
        """Free the engine's memory for the trainer. Level 1 keeps the weights in host memory, level 2 discards them.

        vLLM cannot free memory on a CPU: the engine stops scheduling, and report and span say that nothing was freed.
        A sleep would cut off what other threads generate. So it is refused while one does, or waits for them for up to
        `wait_seconds`. Meanwhile no generation begins; one that was called in that time is refused once the engine is
        asleep.

        Raises:
            EngineStateError: The engine is not awake, other threads generate (and still do after `wait_seconds`), sleep
                mode is not enabled, or `level` is 2 and the engine is frozen: nothing could bring its weights back.
        """
        if level == 2:
            self._weights.require_trainer("sleep(level=2)")
        return self._lifecycle.sleep(level, wait_seconds)

    def wake_up(self, tags: Sequence[str] | None = None) -> SleepReport:
        """Allocate memory again: `["weights"]`, `["kv_cache"]`, or both if None. The engine is awake when it has both.

        After a level-2 sleep the next generation syncs the weights first, unless `sync_weights` did so before. Weights
        that arrived during the sleep are verified now, if their sync had to be verified.

        Raises:
            EngineStateError: The engine is not asleep.
            WeightSyncError: The weights that arrived during the sleep are wrong.
        """
        return self._lifecycle.wake_up(tags)

    def pause(self, mode: PauseMode = "keep") -> None:
        """Stop scheduling until `resume`. Running requests are kept for later, awaited (`wait`) or ended (`abort`).

        What `abort` ends comes back with the tokens so far and the finish reason `abort`.

        Raises:
            EngineStateError: The engine is not awake.
        """
        self._lifecycle.pause(mode)

    def resume(self) -> None:
        """Schedule again after `pause`.

        Raises:
            EngineStateError: The engine is not paused.
            WeightSyncError: The weights that arrived during the pause are wrong.
        """
        self._lifecycle.resume()

    def close(self) -> None:
        """Shut the engine down. A second `close` does nothing; every other call then raises `EngineStateError`."""
        self._lifecycle.close()
        self._threads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
