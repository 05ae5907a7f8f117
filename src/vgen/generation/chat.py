"""Conversations as prompts, through a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .images import take_images


class Chat:
    """The chat template of a tokenizer or processor, with the settings that it gets besides the messages.

    A processor's own template goes before its tokenizer's. The rendered text is tokenized without adding special
    tokens. Image placeholders stay as the template writes them: one for each image.
    """

    def __init__(self, processor: Any, settings: Mapping[str, Any]) -> None:
        self._tokenizer = getattr(processor, "tokenizer", processor)
        template = settings.get("chat_template") or getattr(processor, "chat_template", None)
        self._template_owner = processor if template else self._tokenizer
        self._settings = {"add_generation_prompt": True, **settings, "tokenize": False}

    def render_all(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[list[Any], list[list[Any]]]:
        """The token ids and the images of each conversation.

        If a conversation cannot be rendered, its `PromptError` stands in the place of its token ids: `generate` raises
        the error or marks the completions with it.
        """
        prompts, all_images = list[Any](), list[list[Any]]()
        for index, conversation in enumerate(conversations):
            try:
                ids, images = self.render(index, conversation)
            except PromptError as error:
                ids, images = error, []
            prompts.append(ids)
            all_images.append(images)
        return prompts, all_images

    def render(self, index: int, conversation: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[Any]]:
        """Token ids and images of the conversation with that index. Raises `PromptError` if the template refuses it."""
        from jinja2 import TemplateError, TemplateSyntaxError

        messages, images = take_images(index, conversation)
        try:
            text = self._template_owner.apply_chat_template(messages, **self._settings)
        except TemplateSyntaxError:
            raise  # The template itself is wrong, not this conversation.
        except TemplateError as error:
            raise PromptError(index, f"was refused by the chat template: {error.message}") from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]), images
