"""Completions as bytes, and the messages of vgen's batch route: one call for many completions.

`pack` and `unpack` are the one codec for a `Completion`. Trainer ranks and vgen's server route both use it. A packed
completion is an array in MessagePack. Its token ids are little-endian int32. Its log-probabilities are float32 where
that loses nothing (an engine's own are single precision) and float64 otherwise, with NaN for None. That is about 8
bytes for a token with its log-probability: a quarter of the size of JSON, and a tenth of its decoding time
(`benchmarks/generate.py` measures it).

The batch route answers with frames. A frame is a length (four bytes, big-endian) and one MessagePack message.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import msgspec

from .errors import error_from_dict, error_to_dict
from .types import Completion, RequestTiming, none_for_nan

PATH = "/inference/vgen/generate"
"""The batch route. vLLM's own API key guards every path below `/inference`."""
MEDIA_TYPE = "application/x-msgpack"
INT_BYTES = 4
"""The size of a packed token id."""
HEARTBEAT_SECONDS = 5.0
"""A server that works on a batch sends at least one frame in so many seconds."""
SILENCE_SECONDS = 60.0
"""A client takes a server for lost when it has sent nothing for so many seconds."""
BODY_LIMIT = 128 << 20
"""How many bytes a request to the batch route may have: 4,096 prompts of 8,192 tokens, or hundreds of images.

A server answers a longer one with status 413. A client then sends the requests of the call one by one.
"""
ID_LIMIT = 200
"""How many characters `BatchRequest.id` may have: the engine gets a copy of it for each completion."""


class PackedCompletion(msgspec.Struct, array_like=True):
    """A `Completion` whose lists of numbers are bytes. Fields that are not described here are the completion's own."""

    rank: int
    prompt_index: int
    generation_index: int
    token_ids: bytes
    logprobs: bytes | None
    top_logprobs: tuple[bytes, bytes, bytes] | None
    """How many tokens each position has, then all positions' token ids, then their log-probabilities."""
    prompt_logprobs: bytes | None
    finish_reason: str | None
    weight_version: str | None
    weight_versions: list[tuple[str, int, int]] | None
    request_id: str | None
    server: str | None
    timing: RequestTiming | None
    """With timestamps of the sender's monotonic clock."""
    error: dict[str, Any] | None
    """As `error_to_dict` gives it."""


def pack(completion: Completion) -> PackedCompletion:
    """`completion`, ready for MessagePack."""
    top = completion.top_logprobs
    return PackedCompletion(
        completion.rank,
        completion.prompt_index,
        completion.generation_index,
        ints(completion.token_ids),
        _optional(floats, completion.logprobs),
        _optional(_pack_top, top),
        _optional(floats, completion.prompt_logprobs),
        completion.finish_reason,
        completion.weight_version,
        completion.weight_versions,
        completion.request_id,
        completion.server,
        completion.timing,
        _optional(error_to_dict, completion.error),
    )


def unpack(packed: PackedCompletion, *, shift_ns: int = 0, **changes: Any) -> Completion:
    """The completion that was packed. Raises `ValueError` for what `pack` never makes.

    `shift_ns` is added to the timing's timestamps: the receiver's monotonic clock minus the sender's. `changes` are
    fields of `Completion` that the receiver knows better, such as `server`.
    """
    values: dict[str, Any] = {name: getattr(packed, name) for name in packed.__struct_fields__}
    try:
        values |= {
            "token_ids": to_ints(packed.token_ids),
            "logprobs": _optional(to_floats, packed.logprobs),
            "top_logprobs": _optional(_unpack_top, packed.top_logprobs),
            "prompt_logprobs": _optional(to_floats, packed.prompt_logprobs),
            "error": _optional(error_from_dict, packed.error),
        }
    except (LookupError, TypeError, StopIteration) as error:
        raise ValueError(f"the completion was not packed by vgen ({type(error).__name__}: {error})") from error
    if (timing := packed.timing) is not None:
        queued_ns, finished_ns = timing.queued_ns + shift_ns, timing.finished_ns + shift_ns
        values["timing"] = replace(timing, queued_ns=queued_ns, finished_ns=finished_ns)
    return Completion(**values | changes)


def _optional(convert: Any, value: Any) -> Any:
    return None if value is None else convert(value)


def _pack_top(positions: Sequence[Sequence[tuple[int, float | None]]]) -> tuple[bytes, bytes, bytes]:
    pairs = [pair for position in positions for pair in position]
    return ints([*map(len, positions)]), ints([token for token, _ in pairs]), floats([value for _, value in pairs])


def _unpack_top(packed: tuple[bytes, bytes, bytes]) -> list[list[tuple[int, float | None]]]:
    widths, ids, values = packed
    pairs = zip(to_ints(ids), to_floats(values), strict=True)
    return [[next(pairs) for _ in range(width)] for width in to_ints(widths)]


def ints(values: Sequence[int]) -> bytes:
    """`values` as little-endian int32. Raises `struct.error` for a number that does not fit."""
    return struct.pack(f"<{len(values)}i", *values)


def to_ints(raw: bytes) -> list[int]:
    """The numbers that `ints` packed. Raises `ValueError` for half a number."""
    if len(raw) % INT_BYTES:
        raise ValueError("not a whole number of int32")
    return [*struct.unpack(f"<{len(raw) // INT_BYTES}i", raw)]


def floats(values: list[Any]) -> bytes:
    """`values` with NaN for None, after one byte: `f` for float32 where that is exact, else `d` for float64."""
    try:
        double = struct.pack(f"<{len(values)}d", *values)
    except struct.error:  # some are None
        double = struct.pack(f"<{len(values)}d", *(math.nan if value is None else value for value in values))
    single = _narrowed(double)
    return b"d" + double if single is None else b"f" + single


def _narrowed(double: bytes) -> bytes | None:
    """Little-endian float64 as float32; None where that changes a bit of any number."""
    form = f"<{len(double) // 8}"
    if double and sys.byteorder == "little" and "torch" in sys.modules:
        import torch  # a quarter of the time of `struct`, and loaded wherever there are ranks or an engine

        single = bytearray(len(double) // 2)
        wide = torch.frombuffer(bytearray(double), dtype=torch.float64)
        narrow = torch.frombuffer(single, dtype=torch.float32).copy_(wide)
        return bytes(single) if torch.equal(narrow.double().view(torch.int64), wide.view(torch.int64)) else None
    try:
        packed = struct.pack(form + "f", *struct.unpack(form + "d", double))
    except OverflowError:
        return None
    return packed if struct.pack(form + "d", *struct.unpack(form + "f", packed)) == double else None


def to_floats(raw: bytes) -> list[float | None]:
    """The numbers that `floats` packed, None for every NaN. Raises `ValueError` for all else."""
    kind = chr(raw[0]) if raw else ""
    if kind not in ("f", "d") or (len(raw) - 1) % struct.calcsize(kind):
        raise ValueError("neither float32 nor float64")
    return none_for_nan([*struct.unpack_from(f"<{(len(raw) - 1) // struct.calcsize(kind)}{kind}", raw, 1)])


class Wanted(msgspec.Struct, array_like=True):
    """One completion that the client asks for."""

    prompt: int
    """The place of its prompt in `BatchRequest.prompts`."""
    seed: int | None
    traceparent: str | None


class BatchRequest(msgspec.Struct):
    """The body of a request to the batch route."""

    id: Annotated[str, msgspec.Meta(max_length=ID_LIMIT)]
    """Completion `i` gets the request id `<id>-<i>` in the engine."""
    prompts: list[bytes]
    """Each prompt once, its token ids as `ints` packs them."""
    wanted: list[Wanted]
    sampling: dict[str, Any]
    """Fields of `vgen.Sampling`; those that are left out have their defaults."""
    images: list[list[bytes]] = []
    """The images of each prompt as PNG files, one list for each prompt; empty where no prompt has any."""
    lora_name: str | None = None
    priority: int = 0


class Done(msgspec.Struct, array_like=True, tag=0):
    """A finished completion."""

    index: int
    """Its place in `BatchRequest.wanted`."""
    completion: PackedCompletion
    now_ns: int
    """The server's monotonic clock when it sent this."""


class Failed(msgspec.Struct, array_like=True, tag=1):
    """A completion that will not come."""

    index: int
    status: int
    """An HTTP status: 400 for what the engine refuses, 500 and above for an error of the engine's."""
    message: str
    limit: int | None = None
    """The bound that the prompt broke, where it broke one."""


class Alive(msgspec.Struct, array_like=True, tag=2):
    """No completion is finished, but the server is at work."""

    unfinished: int
    tokens: int | None = None
    """How many tokens the unfinished completions have so far; None where the engine does not tell."""


class End(msgspec.Struct, array_like=True, tag=3):
    """The last frame. An answer without it was cut off."""


Frame = Done | Failed | Alive | End

encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(BatchRequest).decode
decode_frame = msgspec.msgpack.Decoder(Frame).decode


def decode_request(raw: bytes | bytearray) -> BatchRequest:
    """The request in `raw`. Raises `ValueError` for all else, and for a request that contradicts itself."""
    try:
        batch = _decode_request(raw)
    except msgspec.MsgspecError as error:
        raise ValueError(f"the body is no request of vgen's batch route: {error}") from error
    except RecursionError:  # msgspec follows a body as deep as Python's stack reaches
        raise ValueError("the body is no request of vgen's batch route: it is nested too deeply") from None
    if any(len(prompt) % INT_BYTES for prompt in batch.prompts):
        raise ValueError("a prompt's bytes are not a whole number of int32")
    prompts = len(batch.prompts)
    for index, wanted in enumerate(batch.wanted):
        if not 0 <= wanted.prompt < prompts:
            raise ValueError(f"wanted[{index}] is for prompt {wanted.prompt}, and there are {prompts} prompts")
    if batch.images and len(batch.images) != prompts:
        raise ValueError(f"there are images for {len(batch.images)} prompts, and {prompts} prompts")
    return batch


def frame_bytes(frame: Frame) -> bytes:
    """`frame` with its length before it, as it goes over the wire."""
    body = encode(frame)
    return len(body).to_bytes(4, "big") + body
