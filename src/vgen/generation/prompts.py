"""Prompts as an engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engines.base import Engine
from ..errors import PromptError
from ..types import Prompt
from .images import Placeholders
from .images import check as check_images


class Encoder:
    """Makes token ids of prompts, and refuses those that the engine could not take.

    Args:
        engine: Whose lengths and vocabulary count.
        processing_class: A tokenizer or processor, for prompts given as text; None where there are none.
    """

    def __init__(self, engine: Engine, processing_class: Any) -> None:
        self._engine, self._processor = engine, processing_class
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens; without a tokenizer the numbers."""
        return str(ids) if self._tokenizer is None else self._tokenizer.decode(ids)

    def ids(self, index: int, prompt: Prompt | PromptError) -> list[int]:
        """The token ids of a prompt, unchecked. One that was refused before it came here is raised."""
        if isinstance(prompt, PromptError):
            raise prompt
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            raise TypeError(f"prompt {index} is text: construct with processing_class to pass text")
        return list(self._tokenizer(prompt)["input_ids"])

    def encode(
        self, prompts: Sequence[Prompt], images: Sequence[Sequence[Any] | None] | None
    ) -> tuple[list[list[int]], list[list[int]], dict[int, PromptError]]:
        """The prompts as token ids, as the engine takes them, and what it could not take, by their place."""
        placeholders = Placeholders(self._processor)
        encoded: list[list[int]] = [[] for _ in prompts]
        placed, errors = list(encoded), dict[int, PromptError]()
        for index, prompt in enumerate(prompts):
            try:
                encoded[index] = self.ids(index, prompt)
                self._check(index, encoded[index])
                own = (images[index] or ()) if images is not None else ()
                check_images(index, own)
                placed[index] = placeholders.one_each(index, encoded[index], own)
            except PromptError as error:
                errors[index] = error
        return encoded, placed, errors

    def _check(self, index: int, ids: Sequence[int]) -> None:
        limit, vocabulary = self._engine.max_model_length - 1, self._engine.vocabulary_size
        if not ids:
            raise PromptError(index, "is empty")
        if len(ids) > limit:
            raise PromptError(index, f"has {len(ids)} tokens; at most {limit} leave room for a completion", limit)
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise PromptError(index, f"holds a token id outside the vocabulary of {vocabulary}", vocabulary)
