"""`Sampling` as vLLM's own parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import Sampling


def sampling_params(sampling: Sampling, seed: int | None) -> Any:
    """vLLM's `SamplingParams` of one request. Raises `ValueError` or `TypeError` for what makes no sense."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    kwargs: dict[str, Any] = dict(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        ignore_eos=sampling.ignore_eos,
        seed=seed,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        detokenize=bool(sampling.stop),
    )
    if sampling.structured_outputs is not None:
        kwargs["structured_outputs"] = sampling.structured_outputs
    kwargs.update(sampling.extra)
    if isinstance(structured := kwargs.get("structured_outputs"), Mapping):
        try:
            kwargs["structured_outputs"] = StructuredOutputsParams(**structured)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Sampling.structured_outputs was refused by vLLM: {error}") from error
    return SamplingParams(**kwargs)
