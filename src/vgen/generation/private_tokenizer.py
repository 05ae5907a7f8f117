"""A tokenizer of vgen's own, which the trainer's threads cannot disturb."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

from ..errors import ArgumentError, PromptError

logger = logging.getLogger(__name__)


class PrivateTokenizer:
    """A copy of the trainer's tokenizer, used by one thread at a time.

    A fast tokenizer keeps truncation and padding as its state, which each call sets. If the trainer's data loader asks
    for `truncation=True` in another thread, a call on the same object returns truncated prompts, without an error.
    The copy is made at the first use, and again when the trainer has added tokens.

    Args:
        tokenizer: The trainer's, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._original, self._copy, self._size = tokenizer, None, -1
        self._lock = threading.Lock()
        self._said = False

    def encode(self, index: int, text: str, *, special: bool = True) -> list[int]:
        """The token ids of a text. Raises `ArgumentError` without a tokenizer, `PromptError` if it cannot be encoded.

        With `special` the tokenizer adds its special tokens. A text that begins with one, as rendered by a chat
        template, does not get the beginning-of-sequence token twice, which is said once in the log.
        """
        if self._original is None:
            raise ArgumentError(
                "prompts", f"must be token ids: prompt {index} is text, which needs processing_class in the constructor"
            )
        with self._lock:
            tokenizer = self._own()
            try:
                ids = list((tokenizer(text) if special else tokenizer(text, add_special_tokens=False))["input_ids"])
            except (UnicodeError, TypeError) as error:  # half of a surrogate pair is no character
                raise PromptError(index, f"cannot be encoded ({type(error).__name__})") from None
        begin = getattr(tokenizer, "bos_token_id", None)
        if special and begin is not None and ids[:2] == [begin, begin] and text.startswith(tokenizer.bos_token):
            if not self._said:
                self._said = True
                logger.warning(
                    "prompt %d begins with the text of the beginning-of-sequence token, as a chat template writes it: "
                    "the tokenizer's own is left out. This is said once.",
                    index,
                )
            return ids[1:]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens; without a tokenizer, their ids."""
        if self._original is None:
            return str(ids)
        with self._lock:
            return self._own().decode(ids)

    def _own(self) -> Any:
        size = _size(self._original)
        if self._copy is None or size != self._size:
            self._copy, self._size = copy.deepcopy(self._original), size
        return self._copy


def _size(tokenizer: Any) -> int:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else 0
