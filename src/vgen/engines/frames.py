"""What travels on vgen's batch route: one request for many completions, an answer frame for each as it is done.

A frame is a length (four bytes, big-endian) and a message in MessagePack. Token ids are little-endian int32 and
log-probabilities float32, as the engine has them: a tenth of the time, and a quarter of the bytes, of JSON.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from .timing import Times

PATH = "/inference/vgen/generate"
"""Below `/inference`, where vLLM's own API key guards it."""
MEDIA_TYPE = "application/x-msgpack"
HEARTBEAT_SECONDS = 5.0
"""A server that works on a batch says at least this often that it is alive."""
SILENCE_SECONDS = 60.0
"""A server that has said nothing for so long is taken for lost."""


class Wanted(msgspec.Struct, array_like=True):
    """One completion that is asked for."""

    prompt: int
    """Its place in `BatchRequest.prompts`."""
    seed: int | None
    traceparent: str | None


class BatchRequest(msgspec.Struct):
    """The body of a request."""

    id: str
    """Completion `i` has the engine's id `<id>-<i>`."""
    prompts: list[bytes]
    wanted: list[Wanted]
    sampling: dict[str, Any]
    """Fields of `vgen.Sampling`."""
    images: list[list[bytes]] = []
    """Of each prompt, in a format that PIL reads; empty where no prompt has any."""
    lora_name: str | None = None
    priority: int = 0


class Done(msgspec.Struct, array_like=True, tag=0):
    """A completion. Its tokens' log-probabilities, and others', are float32 in the order of the tokens."""

    index: int
    """Its place in `BatchRequest.wanted`."""
    finish_reason: str | None
    token_ids: bytes
    logprobs: bytes | None
    top: list[tuple[bytes, bytes]] | None
    """At each position the ids of the likeliest tokens, likeliest first, and their log-probabilities."""
    prompt_logprobs: bytes | None
    """NaN stands for none, as for a prompt's first token."""
    versions: list[tuple[str, int, int]] | None
    times: Times | None
    """Of the engine's monotonic clock."""
    now: float
    """That clock when this was sent."""
    preemptions: int
    cached_tokens: int


class Failed(msgspec.Struct, array_like=True, tag=1):
    """A completion that will not come."""

    index: int
    status: int
    """As of HTTP: 400 for what the engine refuses, 500 and above for its own fault."""
    message: str
    limit: int | None = None
    """The bound that its prompt broke, where it broke one."""


class Alive(msgspec.Struct, array_like=True, tag=2):
    """Nothing new, but the server is at work."""

    unfinished: int
    tokens: int | None = None
    """How many these have by now; None where the engine does not say."""


class End(msgspec.Struct, array_like=True, tag=3):
    """Nothing comes after it; an answer without it was cut off."""


Frame = Done | Failed | Alive | End

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(BatchRequest).decode
decode_frame = msgspec.msgpack.Decoder(Frame).decode


def pack(frame: Frame) -> bytes:
    """`frame` with its length before it."""
    body = encode(frame)
    return len(body).to_bytes(4, "big") + body


def ints(values: Iterable[int]) -> bytes:
    return _little(array("i", values))


def floats(values: Iterable[float]) -> bytes:
    return _little(array("f", values))


def to_ints(raw: bytes) -> list[int]:
    return _read("i", raw).tolist()


def to_floats(raw: bytes) -> list[float | None]:
    """NaN becomes None."""
    values: Sequence[float] = _read("f", raw).tolist()
    return [value if value == value else None for value in values]


def _little(values: array[Any]) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _read(kind: str, raw: bytes) -> array[Any]:
    values: array[Any] = array(kind, raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values
