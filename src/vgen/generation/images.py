"""Images on their way into prompts: out of conversations, and one placeholder for each."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PromptError


def take_images(index: int, conversation: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The conversation with bare `{"type": "image"}` parts, as chat templates want it, and its images in order.

    An image part holds a `PIL.Image` or a `data:` URI: `{"type": "image", "image": ...}` or
    `{"type": "image_url", "image_url": {"url": ...}}`; one without either keeps its place for an image that comes
    otherwise. Nothing is fetched.
    """
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts: list[Any] = []
            for part in content:
                if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
                    parts.append(part)
                    continue
                parts.append({"type": "image"})
                source = part.get("image", part.get("image_url", part.get("url", part.get("path"))))
                source = source.get("url") if isinstance(source, Mapping) else source
                if source is not None:
                    images.append(_opened(index, source) if isinstance(source, str) else source)
            content = parts
        messages.append({**message, "content": content} if "content" in message else dict(message))
    return messages, images


def _opened(index: int, uri: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    head, _, data = uri.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise PromptError(index, "has an image that is neither a PIL.Image nor a base64 data: URI; nothing is fetched")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
    except (binascii.Error, UnidentifiedImageError, OSError) as error:
        raise PromptError(index, "has a data: URI that holds no image") from error
    return image


def check(index: int, images: Sequence[Any]) -> None:
    """Raise for what is no image: `PromptError`."""
    if images:
        from PIL.Image import Image

        if not all(isinstance(image, Image) for image in images):
            raise PromptError(index, "has an image that is not a PIL.Image.Image")


class Placeholders:
    """Brings prompts into the form that engines take: one placeholder token for each image.

    A processor's own `input_ids` hold each placeholder expanded, to a token for every feature of the image and marks
    around them. An engine would expand the first of these again without a word. What an image expands to is worked
    out once.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._token: int | None = getattr(processor, "image_token_id", None)
        self._once: bool | None = None
        self._expansions: dict[int, tuple[Any, list[tuple[list[int], list[int]]]]] = {}

    def one_each(self, index: int, ids: list[int], images: Sequence[Any]) -> list[int]:
        """`ids` with one placeholder for each image, in order. Raises `PromptError` where they do not match."""
        count = 0 if self._token is None else ids.count(self._token)
        # None: what the processor knows may not be what the engine looks for.
        if count == 0 or (count == len(images) and not self._kept_in_expansion()):
            return ids
        collapsed = self._collapsed(ids, images) if images else None
        if collapsed is None and count != len(images):
            raise PromptError(
                index, f"has {count} tokens in the place of images, which do not fit its {len(images)} images"
            )
        return ids if collapsed is None else collapsed

    def _collapsed(self, ids: list[int], images: Sequence[Any]) -> list[int] | None:
        """`ids` with what each image expands to made its placeholder again; None where they hold something else."""
        collapsed: list[int] = []
        start = 0
        for image in images:
            found = [(at, *pair) for pair in self._expanded(image) if (at := _find(ids, pair[1], start)) is not None]
            if not found:
                return None
            at, placeholder, expanded = min(found)
            collapsed += ids[start:at] + placeholder
            start = at + len(expanded)
        return None if self._token in ids[start:] else collapsed + ids[start:]

    def _kept_in_expansion(self) -> bool:
        """Whether an expanded placeholder holds the token once, among others: then counting it tells nothing."""
        if self._once is None:
            from PIL import Image

            pairs = self._expand(Image.new("RGB", (64, 64)))
            self._once = any(len(ids) > 1 and ids.count(self._token or 0) == 1 for _, ids in pairs)
        return self._once

    def _expanded(self, image: Any) -> list[tuple[list[int], list[int]]]:
        """A placeholder's tokens and what the processor makes of them, for each way to write one."""
        kept = self._expansions.get(id(image))
        if kept is None:
            # The image is kept, or another could get its id.
            kept = self._expansions[id(image)] = image, list(self._expand(image))
        return kept[1]

    def _expand(self, image: Any) -> Iterator[tuple[list[int], list[int]]]:
        processor = self._processor
        for name in ("image_token", "boi_token"):
            if isinstance(text := getattr(processor, name, None), str):
                try:
                    expanded = processor(text=[text], images=[image], add_special_tokens=False)["input_ids"][0]
                except Exception:  # not what this processor writes for an image
                    continue
                yield list(processor.tokenizer(text, add_special_tokens=False)["input_ids"]), list(map(int, expanded))


def _find(ids: list[int], wanted: list[int], start: int) -> int | None:
    """Where `wanted` begins in `ids`, from `start` on."""
    while wanted:
        try:
            start = ids.index(wanted[0], start)
        except ValueError:
            return None
        if ids[start : start + len(wanted)] == wanted:
            return start
        start += 1
    return None
