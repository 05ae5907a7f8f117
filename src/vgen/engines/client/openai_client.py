"""Client for vLLM's own `/v1/completions`, which every vLLM server has."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from ...engine_protocol import Batch, Request
from ...errors import ServerError
from ...types import Completion, RequestTiming
from ..sampling import PLAIN_FIELDS
from ..vllm_logprobs import likeliest_first, number
from .http import HttpClient

PATH = "/v1/completions"


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] | None = None


class _TopLogprobs(_Logprobs):
    top_logprobs: list[dict[str, float | None] | None] | None = None


L = TypeVar("L")
"""What is read of the log-probabilities."""


class _Choice(msgspec.Struct, Generic[L]):
    index: int
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: L | None = None
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None


class _Answer(msgspec.Struct, Generic[L]):
    id: str
    choices: list[_Choice[L]]
    metrics: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None


# A typed decoder makes no objects of the fields that vgen does not read (tokens as text, text offsets).
_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {
    _Logprobs: msgspec.json.Decoder(_Answer[_Logprobs]),
    _TopLogprobs: msgspec.json.Decoder(_Answer[_TopLogprobs]),
}


async def complete(
    http: HttpClient, model: str, batch: Batch, requests: Sequence[Request], timeout: float
) -> list[Completion]:
    """Sample `requests` by one call and return their completions in the same order.

    All requests share the first one's seed and trace context, because a call has only one of each. Completions carry
    timing only if there is one request. Raises `ServerError`.
    """
    prompts = [list(request.token_ids) for request in requests]
    sampling, kind = batch.sampling, _TopLogprobs if batch.sampling.logprobs else _Logprobs
    body: dict[str, Any] = {
        "model": model if batch.lora_request is None else batch.lora_request.lora_name,
        "prompt": prompts if len(prompts) > 1 else prompts[0],
        "seed": requests[0].seed,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        **{name: getattr(sampling, name) for name in PLAIN_FIELDS},
        **({"structured_outputs": sampling.structured_outputs} if sampling.structured_outputs is not None else {}),
        **({"priority": batch.priority} if batch.priority else {}),
        **sampling.extra,
    }
    headers = requests[0].headers
    answer = await http.infer(PATH, msgspec.json.encode(body), headers, lambda raw: _decode(kind, raw), timeout)
    now = time.monotonic_ns()
    try:
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        timing = _timing(answer.metrics, now, answer.usage)
        return [
            _completion(request, choice, f"{answer.id}-{index}", http.name, timing)
            for index, (request, choice) in enumerate(zip(requests, choices, strict=True))
        ]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ServerError("returned completions that are not in vLLM's format", url=http.name) from error


def _decode(kind: type[Any], raw: bytes) -> Any:
    try:
        return _DECODERS[kind].decode(raw)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # Python's json module writes NaN, which is not JSON
        return msgspec.convert(json.loads(raw), _Answer[kind])


def _completion(
    request: Request, choice: Any, request_id: str, server: str, timing: RequestTiming | None
) -> Completion:
    logprobs = top = None
    if choice.logprobs is not None:
        logprobs = [number(value) for value in choice.logprobs.token_logprobs or ()]
        positions = getattr(choice.logprobs, "top_logprobs", None) or ()
        if any(len(position or ()) > 1 for position in positions):
            top = [
                likeliest_first(
                    (int(token.removeprefix("token_id:")), number(value)) for token, value in position.items()
                )
                for position in positions
            ]
    return Completion(
        rank=request.rank,
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


def _prompt_logprobs(
    request: Request, positions: Sequence[Mapping[str, Any] | None] | None
) -> list[float | None] | None:
    if positions is None:
        return None
    pairs = zip(positions, request.token_ids, strict=True)
    return [None if position is None else number(position[str(token)]["logprob"]) for position, token in pairs]


def _timing(metrics: Mapping[str, Any] | None, now: int, usage: Mapping[str, Any] | None) -> RequestTiming | None:
    """The durations that the engine measured, placed so that they end at `now` (nanoseconds of `time.monotonic_ns`).

    The server's clock is not this process's, so its timestamps cannot be used.
    """
    if not metrics or metrics.get("time_to_first_token_ms") is None:
        return None
    # vLLM's time_to_first_token_ms is counted from scheduling here, not from arrival.
    queue, prefill = (metrics.get("queue_time_ms") or 0.0) / 1e3, metrics["time_to_first_token_ms"] / 1e3
    decode = (metrics.get("generation_time_ms") or 0.0) / 1e3
    per_token = metrics.get("mean_itl_ms")
    e2e = queue + prefill + decode
    return RequestTiming(
        queued_ns=now - int(e2e * 1e9),
        finished_ns=now,
        queue=queue,
        prefill=prefill,
        decode=decode,
        time_to_first_token=queue + prefill,
        time_per_output_token=None if per_token is None else per_token / 1e3,
        e2e=e2e,
        cached_tokens=((usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )
