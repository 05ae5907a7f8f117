"""Prompts as vLLM takes them, for an engine in this process and behind vgen's batch route alike."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..errors import PromptError


@functools.cache
def said() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that is not right, with a text that may be repeated."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError, ValueError  # vLLM's own refusals are no ValueErrors


@functools.cache
def refusals() -> tuple[type[Exception], ...]:
    """What it raises while it takes a prompt; an assertion is how its processors miss a placeholder."""
    return (*said(), TypeError, AssertionError, RuntimeError)


def model_prompt(index: int, token_ids: Sequence[int], images: Sequence[Any], config: Any) -> dict[str, Any]:
    """What vLLM renders. Raises `PromptError` for what can be told without looking into the images.

    Render one with images past the cache that tells what the core has (`skip_mm_cache`): it would count on images of
    a prompt that is then refused.
    """
    problem = _problem_of_images(token_ids, images, config)
    if problem is not None:
        raise PromptError(index, problem)
    prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
    if not images:
        return prompt
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    return parse_model_prompt(config, prompt | {"multi_modal_data": {"image": list(images)}})  # pyright: ignore


def rendered(index: int, prompt: Any, config: Any) -> Any:
    """A prompt whose images vLLM has put in their places. Raises `PromptError` where it is too long with them."""
    length, limit = len(prompt["prompt_token_ids"]), config.max_model_len - 1
    if length > limit:
        problem = f"has {length} tokens with its images; at most {limit} leave room for a completion"
        raise PromptError(index, problem, limit)
    return prompt


def misplaced(index: int, error: Exception) -> PromptError:
    """What to raise where vLLM could not render images."""
    return refused(index, "has images that vLLM could not put in their places", error)


def refused(index: int, problem: str, error: Exception) -> PromptError:
    # Other errors' texts may quote the prompt.
    words = f": {error}" if isinstance(error, said()) else f" ({type(error).__name__})"
    found = PromptError(index, problem + words)
    found.__cause__ = error
    return found


def _problem_of_images(token_ids: Sequence[int], images: Sequence[Any], config: Any) -> str | None:
    if images and not config.is_multimodal_model:
        return f"has {len(images)} images, and the model takes none"
    token = getattr(config.hf_config, "image_token_id", None) or getattr(config.hf_config, "image_token_index", None)
    count = 0 if token is None else token_ids.count(token)
    # None at all: the model has another placeholder than what images become, which its processor looks for.
    if count in (0, len(images)):
        return None
    return f"has {count} placeholders for images and {len(images)} images"
