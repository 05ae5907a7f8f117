"""Runs one call of `generate` or `stream`: prepares its prompts, samples, and puts the completions in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ..distributed.ranks import Call, RankPrompt, Ranks, SingleRank
from ..engine_protocol import Engine
from ..errors import ArgumentError
from ..profiling import ProfilingContext, Span, semconv
from ..types import Completion, Completions, Sampling
from ..weights.source.unwrap_model import unwrapped
from .call_plan import CallPlan, CallRequest, make_requests
from .drift import DriftMonitor
from .instrumentation import counts, measure
from .lifecycle import Lifecycle
from .nan_logprobs import NanLogprobs
from .options import RequestTracing
from .progress import progress_bar
from .prompts import Encoder
from .request_tracing import TracedRequests
from .stalls import WatchedCall
from .weight_sync import WeightSync

OnCompletion: TypeAlias = "Callable[[Completion], None] | None"
"""Called with each completion as soon as it is done."""


@dataclass(frozen=True, slots=True)
class CallRunner:
    """Runs calls on one engine, in any number of threads as far as `Lifecycle` allows."""

    engine: Engine
    encoder: Encoder
    ranks: Ranks
    lifecycle: Lifecycle
    weights: WeightSync
    profiling: ProfilingContext
    tracing: RequestTracing
    regex: str | None
    """A regular expression that completions must match, if their sampling asks for no structured output."""
    show_progress: bool
    nan_logprobs: NanLogprobs
    drift: DriftMonitor

    def generate(self, request: CallRequest, on_completion: OnCompletion) -> Completions:
        """See `Generation.generate`."""
        profiling = self.profiling
        with (
            self.ranks.call("generate") as call,
            self.lifecycle.generating("generate"),
            self.lifecycle.watched_span("generate", semconv.GENERATE, request.attributes()) as (span, watched),
        ):
            plan = self._prepare(call, request)
            version = self.weights.version
            span.set({semconv.WEIGHT_VERSION: version, semconv.REFUSED: len(plan.errors) or None})
            self.weights.history.link(span, version)
            with (
                profiling.span(semconv.ENGINE_GENERATE) as engine_span,
                watched.within(engine_span),
                self._traced(plan, engine_span) as traced,
            ):
                sampled = self._sample(call, plan, span, traced, watched, on_completion)
            sampled = call.scatter(sampled)
            if on_completion is not None and not self.ranks.leading:
                for completion in sampled:
                    on_completion(completion)
            with profiling.span(semconv.DECODE_OUTPUTS):
                completions = plan.result(sampled, version)
            if request.refused == "raise":
                # Errors that only the engine could find; those of our own checks were raised above.
                error = next((completion.error for completion in completions if completion.error), call.refused)
                if error is not None:
                    raise error
            self.drift.observe(plan.request, completions, span)
            if profiling.enabled:
                self._record(span, engine_span, completions, version, traced.own)
            return completions

    def stream(self, request: CallRequest) -> Generator[Completion]:
        """See `Generation.stream`."""
        if not isinstance(self.ranks, SingleRank):
            raise ValueError("stream() serves one rank; ranks that share an engine call generate() together")
        profiling, weights, error = self.profiling, self.weights, None
        sampled: dict[tuple[int, int], Completion] = {}
        plan, version, traced_places = None, weights.version, set[tuple[int | None, int]]()
        with self.lifecycle.generating("stream"):
            # A span that is current would leak to the caller at each `yield`.
            span = profiling.detached(semconv.GENERATE, request.attributes())
            try:
                with self.lifecycle.failing_when_broken("stream"):
                    plan = self._prepare(self.ranks, request)
                    yield from (completion for completion in plan.result([], weights.version) if completion.error)
                    version = weights.version
                    weights.history.link(span, version)
                    with (
                        self.lifecycle.watch.watching("stream", span, generator=True) as watched,
                        self._traced(plan, span) as traced,
                        closing(self._completions(span, traced, watched)) as completions,
                    ):
                        traced_places = traced.own
                        for completion in completions:
                            sampled[completion.prompt_index, completion.generation_index] = completion
                            if completion.error is not None and request.refused == "raise":
                                raise completion.error
                            with watched.rest():
                                yield completion
            except BaseException as raised:
                error = type(raised).__name__
                raise
            finally:
                if profiling.enabled:
                    if plan is not None:
                        self._record(span, span, plan.result(sampled.values(), version), version, traced_places)
                    profiling.finish(span, error)

    def _prepare(self, call: Call, request: CallRequest) -> CallPlan:
        """Check the call, gather the prompts of all ranks that share the engine, and bring missing weights."""
        prompts, sampling, count = request.prompts, request.sampling, request.num_generations
        if sampling.structured_outputs is None and self.regex is not None:
            sampling = replace(sampling, structured_outputs={"regex": self.regex})
        self.drift.say_once(sampling)
        vocabulary = self.engine.vocabulary_size
        if any(token >= vocabulary for token in sampling.stop_token_ids):
            raise ArgumentError("Sampling.stop_token_ids", f"holds an id outside the vocabulary of {vocabulary}")
        request = replace(request, sampling=_ending(sampling, self.weights.source.model, vocabulary))
        images = [tuple(each or ()) for each in request.images or [()] * len(prompts)]
        prompt_ids, engine_ids, errors = self.encoder.encode(prompts, images)
        if errors and request.refused == "raise":
            raise next(iter(errors.values()))
        own_prompts = [
            RankPrompt(index, ids, images[index], self.ranks.index)
            for index, ids in enumerate(engine_ids)
            if index not in errors
        ]
        gathered = call.gather(own_prompts, request.terms())
        self.weights.sync_if_stale()
        requests = make_requests(gathered, count, sampling.seed, self.ranks.engine)
        prompt_ids = [[] if index in errors else ids for index, ids in enumerate(prompt_ids)]
        return CallPlan(prompt_ids, errors, requests, request)

    def _sample(
        self,
        call: Call,
        plan: CallPlan,
        span: Span,
        traced: TracedRequests,
        watched: WatchedCall,
        on_completion: OnCompletion,
    ) -> list[Completion]:
        """Everything that this rank's engine samples in the call, for other ranks too, in any order."""

        def sample() -> list[Completion]:
            sampled: list[Completion] = []
            with (
                progress_bar(len(plan.requests), enabled=self.show_progress) as advance,
                closing(self._completions(span, traced, watched)) as completions,
            ):
                for completion in completions:
                    sampled.append(completion)
                    advance(len(completion.token_ids))
                    call.alive()
                    is_this_ranks = completion.rank == self.ranks.index
                    if on_completion is not None and completion.error is None and is_this_ranks:
                        on_completion(completion)
            return sampled

        # A rank without an engine waits for the leader. If that takes long, the leader reports the stall.
        waiting = nullcontext() if self.ranks.leading else watched.rest()
        with self.lifecycle.failing_when_broken("generate"), waiting:
            return call.lead(sample)

    def _completions(self, span: Span, traced: TracedRequests, watched: WatchedCall) -> Generator[Completion]:
        """What the engine samples, as it is done. Closing it aborts the rest."""
        batch = replace(traced.batch(), on_progress=watched.progressed)
        with closing(self.engine.stream(batch)) as completions:
            for completion in completions:
                watched.progressed()
                traced.finish(completion)
                self.nan_logprobs.check(completion, span, self.weights.version)
                yield completion

    def _traced(self, plan: CallPlan, parent: Span) -> TracedRequests:
        """Chooses the requests that are traced from the moment they are sent, as children of `parent`."""
        count = self.tracing.traced_requests
        if not isinstance(count, int):
            count = count(None if parent.step is None else parent.step.number)
        return TracedRequests(self.profiling, parent, plan, self.ranks.index, count, self.encoder.decode)

    def _record(
        self,
        span: Span,
        engine_span: Span,
        completions: Completions,
        version: str,
        traced_places: Collection[tuple[int | None, int]],
    ) -> None:
        """Everything that is known only after the call: its counts, its requests, and syncs that happened meanwhile."""
        span.set({semconv.WEIGHT_VERSION: version, **counts(completions)})
        self.weights.history.link_later(span, version, completions)
        slowest, decode = self.tracing.request_spans, self.encoder.decode
        measure(self.profiling, engine_span, completions, slowest, traced_places, decode)


def _ending(sampling: Sampling, model: Any, vocabulary: int) -> Sampling:
    """`sampling` that also stops at each end-of-sequence token of the trainer's model as it is now.

    An engine knows only those of its own checkpoint, and perhaps none at all. Tokens that it cannot sample are left
    out: with `min_tokens` they would end it.
    """
    generation = getattr(unwrapped(model), "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    if sampling.ignore_eos or ends is None:
        return sampling
    ends = ends.tolist() if hasattr(ends, "tolist") else ends
    known = [end for end in (ends if isinstance(ends, list | tuple) else [ends]) if end < vocabulary]
    stops = dict.fromkeys([*sampling.stop_token_ids, *known])
    return replace(sampling, stop_token_ids=tuple(stops))
