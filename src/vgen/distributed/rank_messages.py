"""What trainer ranks send each other: MessagePack, in which long lists of numbers are bytes. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..completion_codec import PackedCompletion, ints, to_ints
from .ranks import RankPrompt


class PackedImage(msgspec.Struct, array_like=True):
    """A `PIL.Image` as its pixels."""

    mode: str
    size: tuple[int, int]
    palette: list[int] | None
    pixels: bytes


class PackedPrompt(msgspec.Struct, array_like=True):
    """A `RankPrompt` without its rank, which is the sender's."""

    prompt_index: int
    token_ids: bytes
    images: list[PackedImage]


class Message(msgspec.Struct, array_like=True):
    """One message within one call."""

    kind: str
    call: int
    """The call's number: a message of an earlier call is ignored."""
    rank: int
    """Who sent it."""
    data: dict[str, Any] = {}
    """Plain values, by name; which ones depends on the kind."""
    prompts: list[PackedPrompt] = []
    completions: list[PackedCompletion] = []


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode


def comparable(terms: Mapping[str, Any]) -> dict[str, str]:
    """Each of `terms` as a text that is equal on two ranks if the values are equal.

    A value that JSON has no form for is represented by the name of its type.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        names = getattr(value, "__dataclass_fields__", ())
        return {name: getattr(value, name) for name in names} if names else type(value).__name__

    return {name: json.dumps(value, default=plain, sort_keys=True) for name, value in terms.items()}


def pack_prompts(prompts: Sequence[RankPrompt]) -> list[PackedPrompt]:
    """`prompts` with their images as pixels: a format such as PNG does not have every mode, and takes time."""
    return [
        PackedPrompt(
            prompt.prompt_index,
            ints(prompt.token_ids),
            [PackedImage(image.mode, image.size, image.getpalette(), image.tobytes()) for image in prompt.images],
        )
        for prompt in prompts
    ]


def unpack_prompts(message: Message) -> list[RankPrompt]:
    """The prompts of the rank that sent `message`."""
    return [
        RankPrompt(prompt.prompt_index, to_ints(prompt.token_ids), tuple(map(_image, prompt.images)), message.rank)
        for prompt in message.prompts
    ]


def _image(packed: PackedImage) -> Any:
    from PIL import Image

    image = Image.frombytes(packed.mode, packed.size, packed.pixels)
    if packed.palette is not None:
        image.putpalette(packed.palette)
    return image
