"""Prompts at the door of an engine in this process: each is taken, or refused by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import PromptError
from ..types import Completion, Sampling
from . import prompts
from .base import Batch, Request, refusal
from .sampling import sampling_params


class Admission:
    """Hands the requests of a batch to vLLM, before its scheduler runs.

    A prompt's images are processed once for all its completions. What vLLM does not take of one prompt is that
    prompt's `PromptError`; what it would take of none is a `ValueError` that names the parameter.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._count = engine, 0

    def admit(self, batch: Batch, lora: Any, waiting: dict[str, Request]) -> list[Completion]:
        """Note each request in `waiting` under its id; returns those of refused prompts, with their error."""
        taken: dict[int, Any] = {}
        refused: list[Completion] = []
        for request in batch.requests:
            place = request.prompt_index
            parameters = sampling_params(batch.sampling, request.seed)
            if place not in taken:
                taken[place] = self._rendered(request)
            if not isinstance(taken[place], PromptError):
                error = self._add(request, taken[place], parameters, batch, lora, waiting)
                taken[place] = error or taken[place]
            if isinstance(taken[place], PromptError):
                refused.append(refusal(request, taken[place]))
        return refused

    def _rendered(self, request: Request) -> Any:
        """The prompt as vLLM takes it, its images in their places; or why it cannot be."""
        place, config = request.prompt_index, self._engine.model_config
        try:
            prompt = prompts.model_prompt(place, request.token_ids, request.images, config)
            if not request.images:
                return prompt
            (found,) = self._engine.renderer.render_cmpl([prompt], skip_mm_cache=True)
            return prompts.rendered(place, found, config)
        except PromptError as error:
            return error
        except prompts.refusals() as error:
            return prompts.misplaced(place, error)

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
        except prompts.refusals() as error:
            self._drop(request_id)
            del waiting[request_id]
            self._blame_parameters(batch.sampling, lora, error)
            return prompts.refused(request.prompt_index, "was refused by vLLM", error)
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
        except prompts.refusals():
            return False
        finally:
            self._drop("vgen-probe")
        return True

    def _drop(self, request_id: str) -> None:
        """vLLM may have noted a request before it refused it."""
        self._engine.abort_request([request_id])
