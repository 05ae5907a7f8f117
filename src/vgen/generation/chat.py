"""Conversations as prompts, through a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ArgumentError, PromptError
from .call_plan import Images
from .images import take_images


class Chat:
    """The chat template of a tokenizer or processor, with the settings that it gets besides the messages, if not None.

    A processor's own template goes before its tokenizer's. `encode` gets the rendered text, and adds no special tokens.
    Image placeholders stay as the template writes them: one for each image.
    """

    def __init__(self, processor: Any, settings: Mapping[str, Any], encode: Callable[[int, str], list[int]]) -> None:
        if processor is None:
            raise ArgumentError("conversations", "need a tokenizer: pass processing_class to the constructor")
        settings = {name: value for name, value in settings.items() if value is not None}
        template = settings.get("chat_template") or getattr(processor, "chat_template", None)
        self._template_owner = processor if template else getattr(processor, "tokenizer", processor)
        if not template and not getattr(self._template_owner, "chat_template", "?"):
            raise ArgumentError("chat_template", "must be given: the tokenizer has none of its own")
        self._encode = encode
        self._settings = {"add_generation_prompt": True, **settings, "tokenize": False}

    def render_all(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], images: Images = None
    ) -> tuple[list[Any], Images]:
        """The token ids and the images of each conversation: those in its messages, or the `images` of the caller.

        If a conversation cannot be rendered, its `PromptError` stands in the place of its token ids: `generate` raises
        the error or marks the completions with it.
        """
        prompts, all_images = list[Any](), list[list[Any]]()
        for index, conversation in enumerate(_listed(conversations)):
            try:
                ids, own = self.render(index, conversation)
            except PromptError as error:
                ids, own = error, []
            prompts.append(ids)
            all_images.append(own)
        if not any(all_images):
            return prompts, images
        if images is not None:
            raise ArgumentError("images", "must be None: the conversations hold images")
        return prompts, all_images

    def render(self, index: int, conversation: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[Any]]:
        """Token ids and images of the conversation with that index. Raises `PromptError` if the template refuses it."""
        from jinja2 import TemplateError, TemplateSyntaxError

        if not isinstance(conversation, Sequence) or not all(isinstance(each, Mapping) for each in conversation):
            raise PromptError(index, "must be a list of messages: {'role': ..., 'content': ...}")
        messages, images = take_images(index, [_with_parsed_arguments(message) for message in conversation])
        try:
            text = self._template_owner.apply_chat_template(messages, **self._settings)
        except TemplateSyntaxError:
            raise  # The template itself is wrong, not this conversation.
        except TemplateError as error:
            raise PromptError(index, f"was refused by the chat template: {error.message}") from error
        return self._encode(index, text), images


def _listed(conversations: Any) -> list[Any]:
    if isinstance(conversations, str | bytes | Mapping):
        kind = type(conversations).__name__
        raise ArgumentError("conversations", f"must be a list of lists of messages, got a {kind}")
    listed: list[Any] = list(conversations)
    if listed and isinstance(listed[0], Mapping):
        raise ArgumentError("conversations", "must be a list of conversations, got one: pass [messages]")
    return listed


def _with_parsed_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """`message` with the arguments of its tool calls as objects.

    OpenAI's format has them as JSON text, which templates would encode a second time.
    """
    calls: Any = message.get("tool_calls")
    if not isinstance(calls, Sequence):
        return message
    return {**message, "tool_calls": [_with_parsed(call) for call in calls]}


def _with_parsed(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_parsed(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        parsed = json.loads(call["arguments"])
    except ValueError:
        return call  # what a model wrote may be no JSON; the template writes it as it is
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
