"""vgen's batch route, from the client: many completions by one call, each as it is done."""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import fields
from typing import Any

from ..errors import ServerError
from ..types import Completion, RequestTiming, Sampling
from . import frames
from .base import Batch, Request, refused_by
from .frames import Alive, BatchRequest, Done, End, Failed, Wanted
from .http import Server
from .timing import timing


async def complete(
    server: Server, batch: Batch, requests: Sequence[Request], timeout: float
) -> AsyncGenerator[Completion | tuple[Request, ServerError]]:
    """Yield each of `requests` as it is done, or refused, or with the error that it alone has met in the engine."""
    call = f"vgen-{secrets.token_hex(6)}"
    body = frames.encode(_body(batch, requests, call))
    answers = server.frames(frames.PATH, body, frames.decode_frame, timeout, frames.SILENCE_SECONDS)
    ended, tokens = False, 0
    async for frame in answers:
        if isinstance(frame, Done):
            yield _completion(requests[frame.index], frame, f"{call}-{frame.index}", server.name)
        elif isinstance(frame, Failed):
            request, said = requests[frame.index], {"status": frame.status, "said": frame.message}
            problem = f"a request failed in the engine: {frame.message}"
            error = ServerError(problem, url=server.name, retryable=frame.status >= 500, **said)
            yield (request, error) if error.retryable else refused_by(request, error, frame.limit)
        elif isinstance(frame, Alive):
            # that a server is there does not say that its engine is at work
            before, tokens = tokens, frame.tokens or 0
            if frame.tokens is None or tokens != before:
                batch.moved()
        ended = isinstance(frame, End)
    if not ended:
        raise ServerError("a batch was cut off", url=server.name, retryable=True)


def _body(batch: Batch, requests: Sequence[Request], call: str) -> BatchRequest:
    places: dict[int, int] = {}
    distinct: list[Request] = []
    for request in requests:
        if request.prompt_index not in places:
            places[request.prompt_index] = len(distinct)
            distinct.append(request)
    return BatchRequest(
        id=call,
        prompts=[frames.ints(request.token_ids) for request in distinct],
        wanted=[
            Wanted(places[request.prompt_index], request.seed, request.headers.get("traceparent"))
            for request in requests
        ],
        sampling=_changed(batch.sampling),
        images=[[_png(image) for image in request.images] for request in distinct]
        if any(request.images for request in distinct)
        else [],
        lora_name=None if batch.lora_request is None else batch.lora_request.lora_name,
        priority=batch.priority,
    )


def _changed(sampling: Sampling) -> dict[str, Any]:
    """The fields that differ from their defaults: a server of another version may not know all of them."""
    usual = Sampling()
    return {
        field.name: value
        for field in fields(sampling)
        if (value := getattr(sampling, field.name)) != getattr(usual, field.name)
    }


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _completion(request: Request, done: Done, request_id: str, server: str) -> Completion:
    top = None
    if done.top is not None:
        top = [list(zip(frames.to_ints(ids), frames.to_floats(values), strict=True)) for ids, values in done.top]
    return Completion(
        prompt_index=request.prompt_index,
        generation_index=request.generation_index,
        token_ids=frames.to_ints(done.token_ids),
        logprobs=None if done.logprobs is None else frames.to_floats(done.logprobs),
        top_logprobs=top,
        prompt_logprobs=None if done.prompt_logprobs is None else frames.to_floats(done.prompt_logprobs),
        finish_reason=done.finish_reason,
        weight_version=done.versions[-1][0] if done.versions else None,
        weight_versions=done.versions,
        request_id=request_id,
        server=server,
        timing=_timing(done),
    )


def _timing(done: Done) -> RequestTiming | None:
    """The engine's own times, on this process's clock: what was now there when it was sent is now here."""
    if done.times is None:
        return None
    return timing(
        done.times,
        tokens=len(done.token_ids) // 4,
        shift=time.monotonic() - done.now,
        preemptions=done.preemptions,
        cached_tokens=done.cached_tokens,
    )
