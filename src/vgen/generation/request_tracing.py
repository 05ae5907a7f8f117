"""Requests that are traced into the engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..engine_protocol import Batch, Request
from ..profiling import ProfilingContext, Span, semconv
from ..types import Completion
from .call_plan import CallPlan
from .instrumentation import request_attributes

_RANDOM = random.SystemRandom()
"""Not the trainer's `random`: using that would change the trainer's numbers, and seeded ranks would choose alike."""


class TracedRequests:
    """The requests of a call that have a span from their dispatch on, the parent of the engine's own span.

    They are a few random ones: whether a request is traced must be decided before it is sent, because its
    `traceparent` tells the engine. All other requests carry the context of `parent`, marked as not recorded. As a
    context manager it ends the spans that are still open, with the error that was raised.

    Args:
        rank: This rank's number: only its own prompts' places say something to its caller, and are on the spans.
        count: How many requests to trace.
        decode: Makes text of token ids, where content may be recorded.
    """

    def __init__(
        self,
        profiling: ProfilingContext,
        parent: Span,
        plan: CallPlan,
        rank: int,
        count: int,
        decode: Callable[[list[int]], str],
    ) -> None:
        self._profiling, self._parent, self._plan, self._rank, self._decode = profiling, parent, plan, rank, decode
        chosen: Sequence[Request] = ()
        if profiling.enabled and parent.sampled and count > 0:
            chosen = _RANDOM.sample(plan.requests, min(count, len(plan.requests)))
        self._open = {request.key: (self._start(request), request) for request in chosen}
        self.own = {key[1:] for key in self._open if key[0] == rank}
        """`(prompt_index, generation_index)` of this rank's own traced requests."""

    def _start(self, request: Request) -> Span:
        attributes = {
            semconv.PROMPT_INDEX: request.prompt_index if request.rank == self._rank else None,
            semconv.GENERATION_INDEX: request.generation_index,
        }
        return self._profiling.detached(semconv.REQUEST, attributes, parent=self._parent)

    def batch(self) -> Batch:
        """The plan's requests for the engine, with their trace contexts."""
        headers = {key: self._profiling.carrier(span) for key, (span, _) in self._open.items()}
        return self._plan.batch(headers, self._profiling.carrier(self._parent, sampled=False))

    def finish(self, completion: Completion) -> None:
        """End the completion's span, if it has one."""
        if traced := self._open.pop(completion.key, None):
            span, request = traced
            span.set(request_attributes(completion, request.token_ids, self._profiling.capture, self._decode))
            self._profiling.finish(span, None if completion.error is None else type(completion.error).__name__)

    def __enter__(self) -> TracedRequests:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for span, _request in self._open.values():
            self._profiling.finish(span, "aborted" if kind is None else kind.__name__)
        self._open.clear()
