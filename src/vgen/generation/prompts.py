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
"""Up to how many numbers Python's own `max` is as fast as NumPy's."""


class Encoder:
    """Encodes prompts, and refuses those that the engine could not take.

    Args:
        engine: Its maximum length and vocabulary are the limits.
        processing_class: A tokenizer or processor for prompts given as text, or None.
    """

    def __init__(self, engine: Engine, processing_class: Any) -> None:
        self._engine, self._processor = engine, processing_class
        self._tokenizer = PrivateTokenizer(getattr(processing_class, "tokenizer", processing_class))

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens; without a tokenizer, their ids."""
        return self._tokenizer.decode(ids)

    def ids(self, index: int, prompt: Prompt | PromptError) -> list[int]:
        """The token ids of the prompt with that index. Raises `PromptError` if it is neither text nor token ids."""
        if isinstance(prompt, PromptError):
            raise prompt
        vocabulary = self._engine.vocabulary_size
        if not isinstance(prompt, str):
            return token_ids(index, prompt, vocabulary)
        ids = self._tokenizer.encode(index, prompt)
        if ids and max(ids) >= vocabulary:  # another model's tokenizer
            raise PromptError(index, f"holds a token id outside the vocabulary of {vocabulary}", vocabulary)
        return ids

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
        placeholders = Placeholders(self._processor)
        prompt_ids, engine_ids, errors = list[list[int]](), list[list[int]](), dict[int, PromptError]()
        for index, prompt in enumerate(prompts):
            try:
                ids = self.ids(index, prompt)
                self._check(index, ids)
                check_images(index, images[index])
                for_engine = placeholders.one_each(index, ids, images[index])
            except PromptError as error:
                errors[index] = error
                ids, for_engine = [], []
            prompt_ids.append(ids)
            engine_ids.append(for_engine)
        return prompt_ids, engine_ids, errors

    def _check(self, index: int, ids: Sequence[int]) -> None:
        limit = self._engine.max_model_length - 1
        if not ids:
            raise PromptError(index, "is empty")
        if len(ids) > limit:
            raise PromptError(index, f"has {len(ids)} tokens; at most {limit} leave room for a completion", limit)


def token_ids(index: int, prompt: Any, vocabulary: int) -> list[int]:
    """The token ids of one prompt, of Python's, NumPy's or torch's integers, as a list of `int` of its own.

    Raises `PromptError` for anything else, and for ids that the vocabulary does not have.
    """
    if type(prompt) is not list:
        prompt = _listed(index, prompt)
    try:
        values = array("I", prompt)  # takes what has __index__, so neither floats nor text; and nothing below 0
        outside = bool(values) and _highest(values, prompt) >= vocabulary
    except OverflowError:
        outside = True
    except (TypeError, ValueError):
        raise PromptError(index, "must hold integers: token ids") from None
    if outside:
        raise PromptError(index, f"holds a token id outside the vocabulary of {vocabulary}", vocabulary)
    try:
        marshal.dumps(prompt)  # the fastest way to see that these are Python's own integers
    except ValueError:
        return values.tolist()
    return prompt.copy()


def _listed(index: int, prompt: Any) -> list[Any]:
    if hasattr(prompt, "tolist") and not isinstance(prompt, array):
        if getattr(prompt, "ndim", 1) != 1:
            raise PromptError(index, f"has {prompt.ndim} dimensions; token ids have one")
        return prompt.tolist()
    if not isinstance(prompt, Iterable) or hasattr(prompt, "keys") or isinstance(prompt, bytes | bytearray):
        raise PromptError(index, f"must be text or token ids, got {type(prompt).__name__}")
    return list(prompt)


def _highest(values: array[int], prompt: list[int]) -> int:
    """The largest of the values, which `prompt` has too. NumPy takes a microsecond to begin, and is fast then."""
    numpy = sys.modules.get("numpy") if len(values) > SHORT else None
    return max(prompt) if numpy is None else int(numpy.frombuffer(values, numpy.uint32).max())
