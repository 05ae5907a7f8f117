"""Prompts in vLLM's format, for an engine in this process and for the batch route of a server."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..errors import PromptError


@functools.cache
def request_errors() -> tuple[type[Exception], ...]:
    """vLLM's exceptions for a wrong request. Their text may be shown: it does not quote the prompt."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError, ValueError  # VLLMClientError is not a ValueError


@functools.cache
def prompt_errors() -> tuple[type[Exception], ...]:
    """The exceptions by which vLLM refuses a prompt. Its image processors use assertions, for a missing placeholder."""
    return (*request_errors(), TypeError, AssertionError, RuntimeError)


def model_prompt(index: int, token_ids: Sequence[int], images: Sequence[Any], config: Any) -> dict[str, Any]:
    """The prompt as input for vLLM's renderer. Raises `PromptError` for mistakes that show without the images' content.

    Render a prompt with images with `skip_mm_cache`. Otherwise vLLM's cache counts on images that the engine core never
    received, if the prompt is refused afterwards.
    """
    problem = _image_problem(token_ids, images, config)
    if problem is not None:
        raise PromptError(index, problem)
    prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
    if not images:
        return prompt
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    return parse_model_prompt(config, prompt | {"multi_modal_data": {"image": list(images)}})  # pyright: ignore


def checked_length(index: int, prompt: Any, config: Any) -> Any:
    """Return a rendered prompt, whose placeholders were expanded. Raises `PromptError` if it is too long now."""
    length, limit = len(prompt["prompt_token_ids"]), config.max_model_len - 1
    if length > limit:
        problem = f"has {length} tokens with its images; at most {limit} leave room for a completion"
        raise PromptError(index, problem, limit)
    return prompt


def images_refused(index: int, error: Exception) -> PromptError:
    """The error for a prompt whose images vLLM could not render."""
    return refused(index, "has images that vLLM could not put in their places", error)


def refused(index: int, problem: str, error: Exception) -> PromptError:
    """The error for a prompt that vLLM refused with `error`."""
    # The text of other exceptions may quote the prompt.
    reason = f": {error}" if isinstance(error, request_errors()) else f" ({type(error).__name__})"
    refusal = PromptError(index, problem + reason)
    refusal.__cause__ = error
    return refusal


def _image_problem(token_ids: Sequence[int], images: Sequence[Any], config: Any) -> str | None:
    if images and not config.is_multimodal_model:
        return f"has {len(images)} images, and the model takes none"
    token = getattr(config.hf_config, "image_token_id", None) or getattr(config.hf_config, "image_token_index", None)
    count = 0 if token is None else token_ids.count(token)
    # A count of 0 is no problem: some models have another placeholder, which their image processor replaces.
    if count in (0, len(images)):
        return None
    return f"has {count} placeholders for images and {len(images)} images"
