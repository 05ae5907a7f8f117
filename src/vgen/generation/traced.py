"""Requests that are traced into the engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..engines.base import Batch, Request
from ..profiling import ProfilingContext, Span, names
from ..profiling.rollouts import request_attributes
from ..types import Completion
from .job import Job

_RANDOM = random.SystemRandom()
"""Apart from the trainer's `random`, which it must neither advance nor follow: seeded ranks would choose alike."""


class Traced:
    """The requests of a call that have a span from their dispatch on, beneath which the engine's own lies.

    A few random ones: whether a request is traced must be known before it leaves, because its `traceparent` tells
    the engine. All others carry the context of `parent`, and that nothing is to be recorded. As a context manager it
    ends what is still open with what was raised.
    """

    def __init__(
        self, profiling: ProfilingContext, parent: Span, job: Job, count: int, decode: Callable[[list[int]], str]
    ) -> None:
        self._profiling, self._parent, self._job, self._decode = profiling, parent, job, decode
        chosen: Sequence[Request] = ()
        if profiling.enabled and parent.sampled and count > 0:
            chosen = _RANDOM.sample(job.requests, min(count, len(job.requests)))
        self._open: dict[tuple[int, int], tuple[Span, Request]] = {}
        for request in chosen:
            self._open[request.prompt_index, request.generation_index] = self._start(request)
        self.own = {(job.own_index(prompt), generation) for prompt, generation in self._open}
        """`(prompt_index, generation_index)` of each, in the caller's numbers."""

    def _start(self, request: Request) -> tuple[Span, Request]:
        own = {
            names.PROMPT_INDEX: self._job.own_index(request.prompt_index),
            names.GENERATION_INDEX: request.generation_index,
        }
        return self._profiling.detached(names.REQUEST, own, parent=self._parent), request

    def batch(self) -> Batch:
        """The job for the engine."""
        headers = {place: self._profiling.carrier(span) for place, (span, _) in self._open.items()}
        return self._job.batch(headers, self._profiling.carrier(self._parent, sampled=False))

    def finish(self, completion: Completion) -> None:
        """End the completion's span, if it has one."""
        if found := self._open.pop((completion.prompt_index, completion.generation_index), None):
            span, request = found
            capture = self._profiling.capture
            span.set(request_attributes(completion, request.token_ids, capture, self._decode))
            self._profiling.finish(span, None if completion.error is None else type(completion.error).__name__)

    def __enter__(self) -> Traced:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for span, _request in self._open.values():
            self._profiling.finish(span, "aborted" if kind is None else kind.__name__)
        self._open.clear()
