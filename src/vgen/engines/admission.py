"""Prompts at the door of an engine in this process: each is taken, or refused by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import PromptError
from ..types import Completion, Sampling
from .base import Batch, Request, refusal
from .sampling import sampling_params


class Admission:
    """Hands the requests of a batch to vLLM, before its scheduler runs.

    A prompt's images are processed once for all its completions. What vLLM does not take of one prompt is that
    prompt's `PromptError`; what it would take of none is a `ValueError` that names the parameter.
    """

    def __init__(self, engine: Any) -> None:
        from vllm.exceptions import VLLMClientError

        self._engine, self._count = engine, 0
        # vLLM's own refusals are no ValueErrors; an assertion is how its processors miss a placeholder.
        self._said = (VLLMClientError, ValueError)
        self._refusals = (*self._said, TypeError, AssertionError, RuntimeError)

    def admit(self, batch: Batch, lora: Any, waiting: dict[str, Request]) -> list[Completion]:
        """Note each request in `waiting` under its id; returns those of refused prompts, with their error."""
        prompts: dict[int, Any] = {}
        refused: list[Completion] = []
        for request in batch.requests:
            place = request.prompt_index
            parameters = sampling_params(batch.sampling, request.seed)
            if place not in prompts:
                prompts[place] = self._rendered(request)
            if not isinstance(prompts[place], PromptError):
                error = self._add(request, prompts[place], parameters, batch, lora, waiting)
                prompts[place] = error or prompts[place]
            if isinstance(prompts[place], PromptError):
                refused.append(refusal(request, prompts[place]))
        return refused

    def _rendered(self, request: Request) -> Any:
        """The prompt as vLLM takes it, its images in their places; or why it cannot be."""
        place, images = request.prompt_index, list(request.images)
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.token_ids)}
        config = self._engine.model_config
        problem = _problem_of_images(prompt["prompt_token_ids"], images, config)
        if problem is not None:
            return PromptError(place, problem)
        if not images:
            return prompt
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        prompt["multi_modal_data"] = {"image": images}
        try:
            # Past the cache that tells what the core has: it would count on images of a prompt that is then refused.
            parsed = [parse_model_prompt(config, prompt)]
            (rendered,) = self._engine.renderer.render_cmpl(parsed, skip_mm_cache=True)
        except self._refusals as error:
            return self._refused(place, "has images that vLLM could not put in their places", error)
        length, limit = len(rendered["prompt_token_ids"]), config.max_model_len - 1
        if length > limit:
            problem = f"has {length} tokens with its images; at most {limit} leave room for a completion"
            return PromptError(place, problem, limit)
        return rendered

    def _add(
        self, request: Request, prompt: Any, parameters: Any, batch: Batch, lora: Any, waiting: dict[str, Request]
    ) -> PromptError | None:
        self._count += 1
        request_id = f"vgen-{self._count}"
        waiting[request_id] = request
        try:
            self._engine.add_request(
                request_id,
                prompt,
                parameters,
                lora_request=lora,
                trace_headers=request.headers or None,
                priority=batch.priority,
            )
        except self._refusals as error:
            self._drop(request_id)
            del waiting[request_id]
            self._blame_parameters(batch.sampling, lora, error)
            return self._refused(request.prompt_index, "was refused by vLLM", error)
        return None

    def _blame_parameters(self, sampling: Sampling, lora: Any, error: Exception) -> None:
        """Raise if vLLM would not take the shortest of prompts with them either."""
        if self._takes(sampling, lora):
            return
        if sampling.structured_outputs is not None and self._takes(replace(sampling, structured_outputs=None), lora):
            raise ValueError(f"Sampling.structured_outputs was refused by vLLM: {error}") from error
        raise ValueError(f"vLLM refused the sampling parameters: {error}") from error

    def _takes(self, sampling: Sampling, lora: Any) -> bool:
        prompt, parameters = {"prompt_token_ids": [0]}, sampling_params(sampling, None)
        try:
            self._engine.add_request("vgen-probe", prompt, parameters, lora_request=lora)
        except self._refusals:
            return False
        finally:
            self._drop("vgen-probe")
        return True

    def _drop(self, request_id: str) -> None:
        """vLLM may have noted a request before it refused it."""
        self._engine.abort_request([request_id])

    def _refused(self, place: int, problem: str, error: Exception) -> PromptError:
        # Other errors' texts may quote the prompt.
        said = f": {error}" if isinstance(error, self._said[0]) else f" ({type(error).__name__})"
        refused = PromptError(place, problem + said)
        refused.__cause__ = error
        return refused


def _problem_of_images(token_ids: list[int], images: list[Any], config: Any) -> str | None:
    """What can be told without looking into the images."""
    if images:
        from PIL.Image import Image

        if not all(isinstance(image, Image) for image in images):
            return "has an image that is not a PIL.Image.Image"
        if not config.is_multimodal_model:
            return f"has {len(images)} images, and the model takes none"
    token = getattr(config.hf_config, "image_token_id", None) or getattr(config.hf_config, "image_token_index", None)
    count = 0 if token is None else token_ids.count(token)
    # None at all: the model has another placeholder than what images become, which its processor looks for.
    if count in (0, len(images)):
        return None
    return f"has {count} placeholders for images and {len(images)} images"
