"""vgen's batch route, from the client: one call for many completions, each yielded as the server finishes it."""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import fields
from typing import Any

from ... import completion_codec as codec
from ...completion_codec import Alive, BatchRequest, Done, End, Failed, Frame, Wanted
from ...engine_protocol import Batch, Request, refused_by
from ...errors import ServerError
from ...types import Completion, Sampling
from .http import HttpClient


async def complete(
    server: HttpClient, batch: Batch, requests: Sequence[Request], timeout: float
) -> AsyncGenerator[Completion | tuple[Request, ServerError]]:
    """Yield a completion for each request that was sampled or refused, and the error for one that broke in the engine.

    Raises `ServerError` where the whole call failed, or the server answers what it was not asked.
    """
    call = f"vgen-{secrets.token_hex(6)}"
    body = codec.encode(_body(batch, requests, call))
    pending = dict(enumerate(requests))

    def decode(raw: bytes) -> tuple[Frame, Completion | tuple[Request, ServerError] | None]:
        """A frame, and the answer in it. Raises `ValueError`."""
        frame = codec.decode_frame(raw)
        if not isinstance(frame, Done | Failed):
            return frame, None
        request = pending.pop(frame.index, None)
        if request is None:
            raise ValueError("nothing was asked, or everything answered, under this index")
        if isinstance(frame, Done):
            return frame, completion_of(request, frame, server.name)
        error = _error_of(frame, server.name)
        return frame, (request, error) if error.retryable else refused_by(request, error, frame.limit)

    answers = server.frames(codec.PATH, body, decode, timeout, codec.SILENCE_SECONDS)
    ended, tokens = False, 0
    async for frame, answer in answers:
        if answer is not None:
            server.watch.progressed()
            yield answer
        elif isinstance(frame, Alive):
            # A server that answers may have an engine that is stuck: only new tokens are progress.
            before, tokens = tokens, frame.tokens or 0
            if tokens != before:
                server.watch.progressed()
            if frame.tokens is None or tokens != before:
                batch.on_progress()
        ended = isinstance(frame, End)
    if not ended or pending:
        raise ServerError("a batch was cut off", url=server.name, retryable=True)


def _error_of(frame: Failed, url: str) -> ServerError:
    problem, retryable = f"a request failed in the engine: {frame.message}", frame.status >= 500
    return ServerError(problem, url=url, status=frame.status, server_message=frame.message, retryable=retryable)


def _body(batch: Batch, requests: Sequence[Request], call: str) -> BatchRequest:
    distinct = {request.prompt_key: request for request in requests}
    places = {key: place for place, key in enumerate(distinct)}
    return BatchRequest(
        id=call,
        prompts=[codec.ints(request.token_ids) for request in distinct.values()],
        wanted=[
            Wanted(places[request.prompt_key], request.seed, request.headers.get("traceparent")) for request in requests
        ],
        sampling=_changed(batch.sampling),
        images=[[_png(image) for image in request.images] for request in distinct.values()]
        if any(request.images for request in requests)
        else [],
        lora_name=None if batch.lora_request is None else batch.lora_request.lora_name,
        priority=batch.priority,
    )


def _changed(sampling: Sampling) -> dict[str, Any]:
    """The fields that differ from their defaults: a server of another version may not know all of them."""
    values = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    return {name: value for name, value in values.items() if value != getattr(Sampling(), name)}


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def completion_of(request: Request, done: Done, server: str) -> Completion:
    """The completion of `request`, with its timing on this process's clock: the frame arrived as it was sent."""
    return codec.unpack(
        done.completion,
        shift_ns=time.monotonic_ns() - done.now_ns,
        rank=request.rank,
        prompt_index=request.prompt_index,
        generation_index=request.generation_index,
        server=server,
    )
