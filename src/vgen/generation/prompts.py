"""Prompts as token ids that the engine accepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine_protocol import Engine
from ..errors import PromptError
from ..types import Prompt
from .images import Placeholders, check_images


class Encoder:
    """Encodes prompts, and refuses those that the engine could not take.

    Args:
        engine: Its maximum length and vocabulary are the limits.
        processing_class: A tokenizer or processor for prompts given as text, or None.
    """

    def __init__(self, engine: Engine, processing_class: Any) -> None:
        self._engine, self._processor = engine, processing_class
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens; without a tokenizer, their ids."""
        return str(ids) if self._tokenizer is None else self._tokenizer.decode(ids)

    def ids(self, index: int, prompt: Prompt | PromptError) -> list[int]:
        """The token ids of the prompt with that index, not checked. A `PromptError` in its place is raised."""
        if isinstance(prompt, PromptError):
            raise prompt
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            raise TypeError(f"prompt {index} is text: construct with processing_class to pass text")
        return list(self._tokenizer(prompt)["input_ids"])

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
        limit, vocabulary = self._engine.max_model_length - 1, self._engine.vocabulary_size
        if not ids:
            raise PromptError(index, "is empty")
        if len(ids) > limit:
            raise PromptError(index, f"has {len(ids)} tokens; at most {limit} leave room for a completion", limit)
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise PromptError(index, f"holds a token id outside the vocabulary of {vocabulary}", vocabulary)
