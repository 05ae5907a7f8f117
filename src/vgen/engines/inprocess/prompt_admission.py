"""Adds prompts to an engine in this process; each prompt is accepted or refused independently of the others."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from ...engine_protocol import Batch, Request, refusal
from ...errors import PromptError
from ...types import Completion, Sampling
from .. import vllm_prompts
from ..sampling import require_readable, sampling_params

PROBE_ID = "vgen-probe"


class PromptAdmission:
    """Adds the requests of a batch to vLLM's queue, before its scheduler runs.

    `seeds` gives seeds to requests that have none, for engines that would take them from the trainer's random state.
    The images of a prompt are processed once for all its completions. If vLLM refuses one prompt, that prompt gets a
    `PromptError`. If it would refuse every prompt, because of the sampling parameters, `admit` raises `ValueError`.
    """

    def __init__(self, engine: Any, seeds: random.Random | None = None) -> None:
        self._engine, self._seeds, self._count = engine, seeds, 0

    def admit(self, batch: Batch, lora: Any, waiting: dict[str, Request]) -> list[Completion]:
        """Add every request, and put each accepted one into `waiting` by its request ID.

        Returns the completions of refused prompts, which carry the error. If this raises, `waiting` holds the requests
        that were added before.
        """
        prompts: dict[tuple[int, int], Any] = {}
        """By rank and prompt index: the prompt as vLLM takes it, or its `PromptError`."""
        refusals: list[Completion] = []
        if batch.sampling.extra:
            require_readable(sampling_params(batch.sampling, None))
        for request in batch.requests:
            key = request.prompt_key
            seed = request.seed
            if seed is None and self._seeds is not None:
                seed = self._seeds.getrandbits(63)
            parameters = sampling_params(batch.sampling, seed)
            if key not in prompts:
                prompts[key] = self._rendered(request)
            if not isinstance(prompts[key], PromptError):
                error = self._add(request, prompts[key], parameters, batch, lora, waiting)
                prompts[key] = error or prompts[key]
            if isinstance(prompts[key], PromptError):
                refusals.append(refusal(request, prompts[key]))
        return refusals

    def _rendered(self, request: Request) -> Any:
        """The prompt as vLLM takes it, with its images rendered, or the error that refuses it."""
        index, config = request.prompt_index, self._engine.model_config
        try:
            prompt = vllm_prompts.model_prompt(index, request.token_ids, request.images, config)
            if not request.images:
                return prompt
            (rendered,) = self._engine.renderer.render_cmpl([prompt], skip_mm_cache=True)
            return vllm_prompts.checked_length(index, rendered, config)
        except PromptError as error:
            return error
        except vllm_prompts.prompt_errors() as error:
            return vllm_prompts.images_refused(index, error)

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
        except vllm_prompts.prompt_errors() as error:
            self._abort(request_id)
            del waiting[request_id]
            self._check_parameters(batch.sampling, lora, error)
            return vllm_prompts.refused(request.prompt_index, "was refused by vLLM", error)
        return None

    def _check_parameters(self, sampling: Sampling, lora: Any, error: Exception) -> None:
        """Raise `ValueError` if vLLM refuses even a prompt of one token with these parameters."""
        if self._accepts(sampling, lora):
            return
        if sampling.structured_outputs is not None and self._accepts(replace(sampling, structured_outputs=None), lora):
            raise ValueError(f"vLLM refused Sampling.structured_outputs: {error}") from error
        raise ValueError(f"vLLM refused the sampling parameters: {error}") from error

    def _accepts(self, sampling: Sampling, lora: Any) -> bool:
        prompt, parameters = {"prompt_token_ids": [0]}, sampling_params(sampling, None)
        try:
            self._engine.add_request(PROBE_ID, prompt, parameters, lora_request=lora)
        except vllm_prompts.prompt_errors():
            return False
        finally:
            self._abort(PROBE_ID)
        return True

    def _abort(self, request_id: str) -> None:
        """Remove a request. vLLM may have stored it before it refused it."""
        self._engine.abort_request([request_id])
