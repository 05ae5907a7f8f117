"""Images in prompts: takes them out of conversations, and gives prompts one placeholder for each image."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PromptError


def take_images(index: int, conversation: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The conversation with empty `{"type": "image"}` parts, as chat templates expect it, and its images in order.

    An image part holds a `PIL.Image` or a `data:` URI: `{"type": "image", "image": ...}` or
    `{"type": "image_url", "image_url": {"url": ...}}`. A part without an image stands for one that the caller passes
    in `images`. vgen fetches nothing from the network: other addresses raise `PromptError`.
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
                    images.append(_decode_data_uri(index, source) if isinstance(source, str) else source)
            content = parts
        messages.append({**message, "content": content} if "content" in message else dict(message))
    return messages, images


def _decode_data_uri(index: int, uri: str) -> Any:
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


def check_images(index: int, images: Sequence[Any]) -> None:
    """Raise `PromptError` if any of the images is not a `PIL.Image`."""
    if images:
        from PIL.Image import Image

        if not all(isinstance(image, Image) for image in images):
            raise PromptError(index, "has an image that is not a PIL.Image.Image")


class Placeholders:
    """Brings prompts into the form that engines take: one placeholder token for each image.

    The `input_ids` of a processor hold each placeholder expanded: one token for every feature of the image, with marks
    around them. vLLM would silently expand the first of these tokens once more. So this replaces each expansion by the
    placeholder. It computes the expansion of an image only once.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._token: int | None = getattr(processor, "image_token_id", None)
        self._single_token: bool | None = None
        self._expansions: dict[int, tuple[Any, list[tuple[list[int], list[int]]]]] = {}

    def one_each(self, index: int, ids: list[int], images: Sequence[Any]) -> list[int]:
        """`ids` with one placeholder for each image, in order. Raises `PromptError` if they do not match the images."""
        count = 0 if self._token is None else ids.count(self._token)
        # With no placeholder at all vgen cannot judge: the engine may look for another token than the processor names.
        if count == 0 or (count == len(images) and not self._expands_to_single_token()):
            return ids
        collapsed = self._collapsed(ids, images) if images else None
        if collapsed is None and count != len(images):
            raise PromptError(
                index, f"has {count} tokens in the place of images, which do not fit its {len(images)} images"
            )
        return ids if collapsed is None else collapsed

    def _collapsed(self, ids: list[int], images: Sequence[Any]) -> list[int] | None:
        """`ids` with a placeholder in the place of each image's expansion; None if they hold other image tokens."""
        collapsed: list[int] = []
        start = 0
        for image in images:
            matches = [(at, *pair) for pair in self._expanded(image) if (at := _find(ids, pair[1], start)) is not None]
            if not matches:
                return None
            at, placeholder, expanded = min(matches)
            collapsed += ids[start:at] + placeholder
            start = at + len(expanded)
        return None if self._token in ids[start:] else collapsed + ids[start:]

    def _expands_to_single_token(self) -> bool:
        """Whether an expansion holds the image token once, among other tokens. Then their count says nothing about
        whether the prompt is expanded."""
        if self._single_token is None:
            from PIL import Image

            pairs = self._expand(Image.new("RGB", (64, 64)))
            self._single_token = any(len(ids) > 1 and ids.count(self._token or 0) == 1 for _, ids in pairs)
        return self._single_token

    def _expanded(self, image: Any) -> list[tuple[list[int], list[int]]]:
        """The tokens of a placeholder and of its expansion, for each way in which this processor writes one."""
        cached = self._expansions.get(id(image))
        if cached is None:
            # Holds the image too, because the id of an image that is freed may go to another one.
            cached = self._expansions[id(image)] = image, list(self._expand(image))
        return cached[1]

    def _expand(self, image: Any) -> Iterator[tuple[list[int], list[int]]]:
        processor = self._processor
        for name in ("image_token", "boi_token"):
            if isinstance(text := getattr(processor, name, None), str):
                try:
                    expanded = processor(text=[text], images=[image], add_special_tokens=False)["input_ids"][0]
                except Exception:  # This processor does not write images in this way.
                    continue
                yield list(processor.tokenizer(text, add_special_tokens=False)["input_ids"]), list(map(int, expanded))


def _find(ids: list[int], wanted: list[int], start: int) -> int | None:
    """The first index, from `start` on, at which `ids` holds `wanted`."""
    while wanted:
        try:
            start = ids.index(wanted[0], start)
        except ValueError:
            return None
        if ids[start : start + len(wanted)] == wanted:
            return start
        start += 1
    return None
