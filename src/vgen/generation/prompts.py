"""Prompts as token ids that the engine accepts."""

from __future__ import annotations

import marshal
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from ..engine_protocol import Engine
from ..errors import PromptError
from ..types import Prompt
from .images import Placeholders, check_images
from .private_tokenizer import PrivateTokenizer

SHORT = 64
"""Up to how many token ids Python's own functions are as fast as NumPy's."""


class Encoder:
    """Encodes prompts, and refuses those that the engine could not take.

    Args:
        engine: Its maximum length and vocabulary are the limits.
        processing_class: A tokenizer or processor for prompts given as text, or None.
    """

    def __init__(self, engine: Engine, processing_class: Any) -> None:
        self._engine, self._processor = engine, processing_class
        self._tokenizer = PrivateTokenizer(getattr(processing_class, "tokenizer", processing_class))
        self._takes_images = getattr(processing_class, "image_token_id", None) is not None

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens; without a tokenizer, their ids."""
        return self._tokenizer.decode(ids)

    def ids(self, index: int, prompt: Any) -> list[int]:
        """The token ids of the prompt with that index. Raises `PromptError` if it is neither text nor token ids."""
        return token_ids(index, self.unchecked(index, prompt), self._engine.vocabulary_size)

    def unchecked(self, index: int, prompt: Any) -> list[Any]:
        """As `ids`, but what the list holds may be no token ids: for a prompt that `encode` gets in the end."""
        if isinstance(prompt, PromptError):
            raise prompt
        return self._tokenizer.encode(index, prompt) if isinstance(prompt, str) else _listed(index, prompt)

    def rendered(self, index: int, text: str) -> list[int]:
        """The token ids of text that a chat template has rendered, with the special tokens that it holds."""
        return self._tokenizer.encode(index, text, special=False)

    def encode(
        self, prompts: Sequence[Prompt], images: Sequence[Sequence[Any]]
    ) -> tuple[list[list[int]], list[list[int]], dict[int, PromptError]]:
        """Encode prompts with their images (one sequence for each prompt).

        Returns the token ids of each prompt, the token ids as the engine takes them (one placeholder for each image),
        and the errors of refused prompts by index. A refused prompt has no token ids.
        """
        limit, vocabulary = self._engine.max_model_length - 1, self._engine.vocabulary_size
        placeholders = Placeholders(self._processor) if self._takes_images or any(images) else None
        prompt_ids: list[list[int]] = []
        engine_ids: list[list[int]] = []
        errors: dict[int, PromptError] = {}
        for index, prompt in enumerate(prompts):
            try:
                listed = prompt if type(prompt) is list else self.unchecked(index, prompt)
                ids = for_engine = token_ids(index, listed, vocabulary)
                if not 0 < len(ids) <= limit:
                    raise _wrong_length(index, len(ids), limit)
                if placeholders is not None:
                    check_images(index, images[index])
                    for_engine = placeholders.one_each(index, ids, images[index])
            except PromptError as error:
                errors[index] = error
                ids, for_engine = [], []
            prompt_ids.append(ids)
            engine_ids.append(for_engine)
        return prompt_ids, engine_ids, errors


def token_ids(index: int, prompt: Any, vocabulary: int) -> list[int]:
    """The token ids of one prompt, of Python's, NumPy's or torch's integers, as a list of `int` of its own.

    Raises `PromptError` for anything else, and for ids that the vocabulary does not have.
    """
    prompt = _listed(index, prompt)
    try:
        values = array("I", prompt)  # takes what has __index__, so neither floats nor text; and nothing below 0
    except OverflowError:
        raise _outside(index, vocabulary) from None
    except (TypeError, ValueError):
        raise PromptError(index, "must hold integers: token ids") from None
    # NumPy takes a microsecond to begin, and is fast then.
    numpy = sys.modules.get("numpy") if len(values) > SHORT else None
    if numpy is None:
        ids = values.tolist()
        if ids and max(ids) >= vocabulary:
            raise _outside(index, vocabulary)
        return ids
    if numpy.frombuffer(values, numpy.uint32).max() >= vocabulary:
        raise _outside(index, vocabulary)
    return prompt.copy() if _are_ints(prompt) else values.tolist()


def _are_ints(values: list[Any]) -> bool:
    """Whether these integers are all Python's own, of which `marshal` writes each as an `i` and four bytes.

    It writes others in another way, or not at all. A question for each one's type takes twice as long. An engine in
    another process could not read even a bool.
    """
    try:
        return marshal.dumps(values, 2)[5::5] == b"i" * len(values)
    except ValueError:
        return False


def _listed(index: int, prompt: Any) -> list[Any]:
    if type(prompt) is list:
        return prompt
    if hasattr(prompt, "tolist") and not isinstance(prompt, array):
        if getattr(prompt, "ndim", 1) != 1:
            raise PromptError(index, f"has {prompt.ndim} dimensions; token ids have one")
        return prompt.tolist()
    if not isinstance(prompt, Iterable) or hasattr(prompt, "keys") or isinstance(prompt, bytes | bytearray):
        raise PromptError(index, f"must be text or token ids, got {type(prompt).__name__}")
    return list(prompt)


def _outside(index: int, vocabulary: int) -> PromptError:
    return PromptError(index, f"holds a token id outside the vocabulary of {vocabulary}", vocabulary)


def _wrong_length(index: int, length: int, limit: int) -> PromptError:
    if length == 0:
        return PromptError(index, "is empty")
    return PromptError(index, f"has {length} tokens; at most {limit} leave room for a completion", limit)
