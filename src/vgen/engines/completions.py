"""vLLM's own `/v1/completions`: what any vLLM server understands."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..errors import ServerError
from ..types import Completion, RequestTiming
from .base import Batch, Request
from .http import Server
from .logprobs import likeliest_first, number

PATH = "/v1/completions"


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] | None = None


class _TopLogprobs(_Logprobs):
    top_logprobs: list[dict[str, float | None] | None] | None = None


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None


class _TopChoice(_Choice):
    logprobs: _TopLogprobs | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class _Answer(msgspec.Struct):
    id: str
    choices: list[_Choice]
    metrics: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None


class _TopAnswer(_Answer):
    choices: list[_TopChoice]  # pyright: ignore[reportIncompatibleVariableOverride]


# Typed, so that what vgen has no use for (tokens as text, their offsets) is passed over and not made into objects.
_DECODERS = {kind: msgspec.json.Decoder(kind) for kind in (_Answer, _TopAnswer)}


async def complete(
    server: Server, model: str, batch: Batch, requests: Sequence[Request], timeout: float
) -> list[Completion]:
    """Sample `requests` by one call. Only a call for a single one brings timing."""
    prompts = [list(request.token_ids) for request in requests]
    sampling, kind = batch.sampling, _TopAnswer if batch.sampling.logprobs else _Answer
    body: dict[str, Any] = {
        "model": model if batch.lora_request is None else batch.lora_request.lora_name,
        "prompt": prompts if len(prompts) > 1 else prompts[0],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "seed": requests[0].seed,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        **({"structured_outputs": sampling.structured_outputs} if sampling.structured_outputs is not None else {}),
        **({"priority": batch.priority} if batch.priority else {}),
        **sampling.extra,
    }
    headers = requests[0].headers
    answer = await server.infer(PATH, msgspec.json.encode(body), headers, lambda raw: _decode(kind, raw), timeout)
    now = time.monotonic_ns()
    try:
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        timing = _timing(answer.metrics, now, answer.usage)
        return [
            _completion(request, choice, f"{answer.id}-{index}", server.name, timing)
            for index, (request, choice) in enumerate(zip(requests, choices, strict=True))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError("answered completions in a shape that is not vLLM's", url=server.name) from error


def _decode(kind: type[Any], raw: bytes) -> Any:
    try:
        return _DECODERS[kind].decode(raw)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # NaN is no JSON, but Python writes it
        return msgspec.convert(json.loads(raw), kind)


def _completion(
    request: Request, choice: Any, request_id: str, server: str, timing: RequestTiming | None
) -> Completion:
    found = choice.logprobs
    logprobs = top = None
    if found is not None:
        logprobs = [number(value) for value in found.token_logprobs or ()]
        if any(len(position or ()) > 1 for position in getattr(found, "top_logprobs", None) or ()):
            top = [
                likeliest_first(
                    (int(token.removeprefix("token_id:")), number(value)) for token, value in position.items()
                )
                for position in found.top_logprobs
            ]
    return Completion(
        prompt_index=request.prompt_index,
        generation_index=request.generation_index,
        token_ids=choice.token_ids,
        logprobs=logprobs,
        top_logprobs=top,
        prompt_logprobs=_prompt_logprobs(request, choice.prompt_logprobs),
        finish_reason=choice.finish_reason,
        request_id=request_id,
        server=server,
        timing=timing,
    )


def _prompt_logprobs(request: Request, found: Sequence[Mapping[str, Any] | None] | None) -> list[float | None] | None:
    if found is None:
        return None
    pairs = zip(found, request.token_ids, strict=True)
    return [None if at is None else number(at[str(token)]["logprob"]) for at, token in pairs]


def _timing(metrics: Mapping[str, Any] | None, now: int, usage: Mapping[str, Any] | None) -> RequestTiming | None:
    """The engine's own intervals, laid so that they end when the answer arrived: its clock is not this one."""
    if not metrics or metrics.get("time_to_first_token_ms") is None:
        return None
    # what vLLM calls so there is from scheduling to the first token
    queued, prefill = (metrics.get("queue_time_ms") or 0.0) / 1e3, metrics["time_to_first_token_ms"] / 1e3
    decode = (metrics.get("generation_time_ms") or 0.0) / 1e3
    per_token = metrics.get("mean_itl_ms")
    cached = ((usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    e2e = queued + prefill + decode
    return RequestTiming(
        queued_ns=now - int(e2e * 1e9),
        finished_ns=now,
        queue=queued,
        prefill=prefill,
        decode=decode,
        time_to_first_token=queued + prefill,
        time_per_output_token=None if per_token is None else per_token / 1e3,
        e2e=e2e,
        cached_tokens=cached,
    )
