"""How prompts, completions and errors travel between ranks: JSON for the few, packed numbers for the many.

Nothing is ever unpickled. A token is four bytes and so is its log-probability, where that loses nothing (an
engine's are single precision; others travel as doubles).
"""

from __future__ import annotations

import builtins
import json
import math
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from .. import errors
from ..errors import PromptError, RankError
from ..types import Completion, RequestTiming
from .base import Asked

_LENGTH = struct.Struct("!I")
_PLAIN = ("ArithmeticError", "IndexError", "KeyError", "LookupError", "OverflowError", "TypeError", "ValueError")
"""Built-in errors that are raised again as what they are; unknown ones become `RankError`s."""


@dataclass(frozen=True, slots=True)
class Message:
    """Words and numbers."""

    words: dict[str, Any]
    numbers: Sequence[array[Any]] = field(default=())

    def pack(self) -> bytes:
        words = json.dumps({**self.words, "numbers": [[a.typecode, len(a)] for a in self.numbers]}).encode()
        return b"".join([_LENGTH.pack(len(words)), words, *(a.tobytes() for a in self.numbers)])

    @classmethod
    def unpack(cls, raw: bytes | bytearray) -> Message:
        place = _LENGTH.size + _LENGTH.unpack_from(raw)[0]
        words: dict[str, Any] = json.loads(raw[_LENGTH.size : place])
        numbers: list[array[Any]] = []
        for typecode, count in words.pop("numbers"):
            found = array(typecode)
            found.frombytes(memoryview(raw)[place : place + count * found.itemsize])
            place += count * found.itemsize
            numbers.append(found)
        return cls(words, numbers)


def terms(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as JSON gives them back, for comparing; what JSON has no form for is there by its type's name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        names = getattr(value, "__dataclass_fields__", ())
        return {name: getattr(value, name) for name in names} if names else type(value).__name__

    return json.loads(json.dumps(values, default=plain, sort_keys=True))


def pack_prompts(asked: Sequence[Asked]) -> Message:
    """Token ids and images, as pixels."""
    images = [image for _, images in asked for image in images]
    return Message(
        {
            "counts": [len(images) for _, images in asked] if images else None,
            "images": [[image.mode, image.size, image.getpalette()] for image in images],
        },
        [
            array("i", [len(ids) for ids, _ in asked]),
            _ints(ids for ids, _ in asked),
            *(array("B", image.tobytes()) for image in images),
        ],
    )


def unpack_prompts(message: Message) -> list[Asked]:
    lengths, ids, *pixels = message.numbers
    shapes = zip(message.words["images"], pixels, strict=True)
    images = iter([_image(mode, size, palette, found) for (mode, size, palette), found in shapes])
    counts = message.words["counts"] or [0] * len(lengths)
    pairs = zip(_cut(ids, lengths), counts, strict=True)
    return [(found, tuple(next(images) for _ in range(count))) for found, count in pairs]


def _image(mode: str, size: Sequence[int], palette: list[int] | None, pixels: array[Any]) -> Any:
    from PIL import Image

    image = Image.frombytes(mode, (size[0], size[1]), pixels.tobytes())
    if palette is not None:
        image.putpalette(palette)
    return image


def pack_completions(completions: Sequence[Completion], clock_ns: int) -> Message:
    """`clock_ns` is what to add to this process's monotonic clock for wall-clock time."""
    many = completions
    top = [position for c in many for position in c.top_logprobs or ()]
    timings = [c.timing for c in many if c.timing is not None]
    return Message(
        {
            "clock": clock_ns,
            "reasons": [c.finish_reason for c in many],
            "versions": [c.weight_version for c in many],
            "spans": [c.weight_versions for c in many] if any(c.weight_versions for c in many) else None,
            "ids": [c.request_id for c in many],
            "servers": [c.server for c in many],
            "errors": [None if (e := c.error) is None else [e.index, e.problem, e.limit] for c in many],
            "timed": [int(c.timing is not None) for c in many],
        },
        [
            array("i", [c.prompt_index for c in many]),
            array("i", [c.generation_index for c in many]),
            _lengths(c.token_ids for c in many),
            _ints(c.token_ids for c in many),
            _lengths(c.logprobs for c in many),
            _floats(c.logprobs for c in many),
            _lengths(c.prompt_logprobs for c in many),
            _floats(c.prompt_logprobs for c in many),
            _lengths(c.top_logprobs for c in many),
            _lengths(top),
            array("i", [token for position in top for token, _ in position]),
            _floats([value for _, value in position] for position in top),
            array("q", [n for t in timings for n in (t.queued_ns, t.finished_ns, t.preemptions, t.cached_tokens)]),
            _floats(map(_seconds, timings)),
        ],
    )


def unpack_completions(message: Message, clock_ns: int) -> list[Completion]:
    """`clock_ns` is this process's; the timings' timestamps become ones of its monotonic clock."""
    words = message.words
    prompts, generations, lengths, ids, some, logprobs, prompt_some, prompt_logprobs, *rest = message.numbers
    top_some, widths, top_ids, top_values, counts, seconds = rest
    pairs = zip(top_ids.tolist(), _values(top_values), strict=True)
    positions = [[next(pairs) for _ in range(width)] for width in widths]
    timings = iter(_timings(counts, _values(seconds), words["clock"] - clock_ns))
    columns = zip(
        prompts,
        generations,
        _cut(ids, lengths),
        _cut(_values(logprobs), some),
        _cut(_values(prompt_logprobs), prompt_some),
        _cut(positions, top_some),
        words["reasons"],
        words["versions"],
        words["spans"] or [None] * len(prompts),
        words["ids"],
        words["servers"],
        words["errors"],
        words["timed"],
        strict=True,
    )
    return [
        Completion(
            prompt_index=prompt,
            generation_index=generation,
            token_ids=token_ids,
            logprobs=own,
            prompt_logprobs=before,
            top_logprobs=top,
            finish_reason=reason,
            weight_version=version,
            weight_versions=None if spans is None else [(name, start, end) for name, start, end in spans],
            request_id=request_id,
            server=server,
            timing=next(timings) if timed else None,
            error=None if error is None else PromptError(*error),
        )
        for (
            prompt,
            generation,
            token_ids,
            own,
            before,
            top,
            reason,
            version,
            spans,
            request_id,
            server,
            error,
            timed,
        ) in columns
    ]


def _seconds(t: RequestTiming) -> list[float | None]:
    return [t.admission, t.queue, t.prefill, t.decode, t.time_to_first_token, t.time_per_output_token, t.e2e]


def _timings(counts: array[int], seconds: list[Any], shift: int) -> Iterable[RequestTiming]:
    for place in range(len(counts) // 4):
        queued, finished, preemptions, cached = counts[4 * place : 4 * place + 4]
        admission, queue, prefill, decode, first, per_token, e2e = seconds[7 * place : 7 * place + 7]
        yield RequestTiming(
            queued_ns=queued + shift,
            finished_ns=finished + shift,
            admission=admission,
            queue=queue,
            prefill=prefill,
            decode=decode,
            time_to_first_token=first,
            time_per_output_token=per_token,
            e2e=e2e,
            preemptions=preemptions,
            cached_tokens=cached,
        )


def _lengths(lists: Iterable[Sequence[Any] | None]) -> array[int]:
    """The length of each; -1 for None."""
    return array("i", [-1 if found is None else len(found) for found in lists])


def _cut(values: Any, lengths: Iterable[int]) -> list[Any]:
    """`values` in pieces of `lengths`; None for -1."""
    lengths, values = list(lengths), values.tolist() if isinstance(values, array) else values
    ends = accumulate(max(length, 0) for length in lengths)
    return [None if n < 0 else values[end - n : end] for end, n in zip(ends, lengths, strict=True)]


def _ints(lists: Iterable[list[int]]) -> array[int]:
    found = array("i")
    for values in lists:
        found.fromlist(values)
    return found


def _floats(lists: Iterable[list[Any] | None]) -> array[float]:
    """NaN for None; single precision where that is exact."""
    exact = array("d")
    for values in lists:
        try:
            exact.fromlist(values or [])
        except TypeError:
            exact.fromlist([math.nan if value is None else value for value in values or ()])
    return _single(exact) if exact else exact


def _single(exact: array[float]) -> array[float]:
    """In single precision, if that is the same."""
    import torch  # a tenth of the time that `array` takes

    single = array("f", bytes(4 * len(exact)))
    wide, narrow = torch.frombuffer(exact, dtype=torch.float64), torch.frombuffer(single, dtype=torch.float32)
    narrow.copy_(wide)
    return single if torch.equal(narrow.double().view(torch.int64), wide.view(torch.int64)) else exact


def _values(numbers: array[float]) -> list[float | None]:
    values: list[Any] = numbers.tolist()
    return [None if value != value else value for value in values] if math.isnan(sum(values)) else values


def pack_error(error: BaseException) -> dict[str, Any]:
    """An error's type, words, and what it knows besides."""
    plain = (str, int, float, bool, type(None))
    known = {name: value for name, value in vars(error).items() if isinstance(value, plain)}
    words = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
    return {"type": type(error).__name__, "words": words, "known": known}


def unpack_error(found: Mapping[str, Any], rank: int) -> Exception:
    """The error that `rank` raised, with the same type where it is vgen's or a plain one, and a note of where."""
    kind: Any = getattr(errors, found["type"], None)
    if kind is None and found["type"] in _PLAIN:
        kind = getattr(builtins, found["type"])
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return RankError(": ".join(filter(None, (f"rank {rank} raised {found['type']}", found["words"]))), rank=rank)
    error: Any = kind.__new__(kind)
    error.args = (found["words"],)
    error.__dict__.update({"raised_on": rank, **found["known"]})
    error.add_note(f"raised on rank {error.raised_on}")
    return error


def shifted(completions: Iterable[Completion], start: int) -> list[Completion]:
    """`completions` with their prompts counted from `start`."""
    return [
        replace(
            found,
            prompt_index=found.prompt_index - start,
            error=None if (e := found.error) is None else PromptError(found.prompt_index - start, e.problem, e.limit),
        )
        for found in completions
    ]
