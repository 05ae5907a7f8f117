"""The drift monitor: how far an engine's log-probabilities of sampled tokens are from the trainer's own.

It costs one forward pass of the trainer's model over one completion, every `drift_every` weight syncs. A weight that
goes stale, a configuration that differs, or a kernel that rounds worse shows as a wider distribution.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..arguments import integer
from ..engine_protocol import CannotProbe
from ..profiling import ProfilingContext, Span, semconv
from ..types import Completion, Completions, Sampling
from .call_plan import CallRequest
from .weight_sync import WeightSync

logger = logging.getLogger(__name__)

MAX_TOKENS = 256
"""Completion tokens that are compared at a time."""


def renormalized_by(sampling: Sampling) -> str | None:
    """The parameter that makes log-probabilities those of a distribution that the model does not have; None if none.

    vLLM's log-probabilities are those that a token was sampled with: after penalties, and over the tokens that `top_k`,
    `top_p` and `min_p` leave. Temperature divides the logits, which a trainer can do too.
    """
    changes = {
        "top_p": sampling.top_p < 1,
        "top_k": sampling.top_k > 0,
        "min_p": sampling.min_p > 0,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
        "min_tokens": sampling.min_tokens > 0,
        "structured_outputs": sampling.structured_outputs is not None,
        "extra": bool(sampling.extra.keys() & {"logit_bias", "bad_words", "allowed_token_ids"}),
    }
    return next((name for name, changed in changes.items() if changed), None)


@dataclass(slots=True)
class DriftMonitor:
    """Compares one completion with the trainer's model, in the first call of `generate` after every `every` syncs."""

    profiling: ProfilingContext
    weights: WeightSync
    every: int | None
    """None: never."""
    compared: int = 0
    """The number of successful syncs at the last comparison."""
    said: set[str] = field(default_factory=set[str])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.every is not None:
            self.every = integer("drift_every", self.every, least=1, rule="None or an integer of at least 1")

    def say_once(self, sampling: Sampling) -> None:
        """Say in the log that log-probabilities which were asked for are renormalized."""
        if sampling.logprobs is not None and (name := renormalized_by(sampling)) is not None:
            self._say(
                f"{name} is set, so the log-probabilities of completions are not the model's own: they are those of "
                "the distribution that was sampled from. generation.score() gives the model's"
            )

    def observe(self, request: CallRequest, completions: Completions, span: Span) -> None:
        """Compare if a comparison is due, and if the completions can be compared; else the next call does."""
        if self.every is None or self.weights.synced < self.compared + self.every or request.sampling.logprobs is None:
            return
        reason = self._obstacle(request)
        if reason is None and (chosen := self._choose(completions)) is not None:
            token_ids = [*completions.prompt_ids[chosen.prompt_index], *chosen.token_ids[:MAX_TOKENS]]
            try:
                expected = self.weights.source.logprobs(token_ids, request.sampling.temperature or 1.0)
            except CannotProbe as error:
                reason = str(error)
            else:
                self.compared = self.weights.synced
                engine = (chosen.logprobs or [])[:MAX_TOKENS]
                self.record(engine, expected[-len(engine) :], span)
        if reason is not None:
            span.set({semconv.DRIFT_SKIPPED: reason})
            self._say(f"the drift of log-probabilities cannot be measured: {reason}")

    def record(self, engine: Sequence[float | None], model: Sequence[float], span: Span | None = None) -> None:
        """Record the differences of two lists of log-probabilities of the same tokens, in nats."""
        differences = [abs(a - b) for a, b in zip(engine, model, strict=True) if a is not None]
        self.profiling.record_many(semconv.DRIFT, differences)
        if span is not None and differences:
            span.set({semconv.DRIFT_MEAN: sum(differences) / len(differences), semconv.DRIFT_MAX: max(differences)})

    def _obstacle(self, request: CallRequest) -> str | None:
        sampling = request.sampling
        if self.weights.synced_by != threading.get_ident():
            return "another thread than the trainer's generates, which may be in a forward pass of its own"
        if (name := renormalized_by(sampling)) is not None:
            return f"{name} is set, and the trainer's model does not have that distribution"
        if request.images is not None:
            return "the prompts have images"
        if request.lora_request is not None:
            return "the completions are an adapter's"
        if self.weights.source.model is None:
            return "the source has no model"
        if self.weights.source.collective:  # last, because it looks at the whole model
            return "the trainer's model is sharded: its forward pass needs all ranks at the same time"
        return None

    def _choose(self, completions: Completions) -> Completion | None:
        """The longest completion that weights of one version, the last one, have sampled."""
        whole = [
            completion
            for completion in completions
            if completion.logprobs
            and completion.weight_version in (None, self.weights.version)
            and len({version for version, _, _ in completion.weight_versions or ()}) <= 1
        ]
        return max(whole, key=lambda completion: len(completion.token_ids[:MAX_TOKENS]), default=None)

    def _say(self, text: str) -> None:
        with self.lock:
            if text in self.said:
                return
            self.said.add(text)
        logger.warning("vgen: %s", text)
