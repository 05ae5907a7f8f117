"""Conversations as prompts, through a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .images import take_images


class Chat:
    """The chat template of a tokenizer or processor, with what goes into it besides the messages.

    A processor's own template is used before its tokenizer's. The text is tokenized without further special tokens,
    and placeholders of images are left as they are written: one for each.
    """

    def __init__(self, processor: Any, settings: Mapping[str, Any]) -> None:
        self._tokenizer = getattr(processor, "tokenizer", processor)
        own = settings.get("chat_template") or getattr(processor, "chat_template", None)
        self._writer = processor if own else self._tokenizer
        self._settings = {"add_generation_prompt": True, **settings, "tokenize": False}

    def render(self, index: int, conversation: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[Any]]:
        """Token ids and images. Raises `PromptError` where the template refuses the conversation."""
        from jinja2 import TemplateError, TemplateSyntaxError

        messages, images = take_images(index, conversation)
        try:
            text = self._writer.apply_chat_template(messages, **self._settings)
        except TemplateSyntaxError:
            raise
        except TemplateError as error:
            raise PromptError(index, f"was refused by the chat template: {error.message}") from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]), images
