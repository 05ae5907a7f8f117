"""`Sampling` as vLLM's own parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import Sampling

PLAIN_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_tokens", "min_tokens", "ignore_eos", "logprobs", "prompt_logprobs"),
)
"""Fields of `Sampling` that vLLM takes unchanged and under the same name, in process and over HTTP."""


def sampling_params(sampling: Sampling, seed: int | None) -> Any:
    """vLLM's `SamplingParams` for one request, with one output at its end, and log-probabilities in flat lists.

    Raises `ValueError` or `TypeError` for values that vLLM refuses.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    kwargs: dict[str, Any] = {
        **{name: getattr(sampling, name) for name in PLAIN_FIELDS},
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "seed": seed,
        "detokenize": bool(sampling.stop),  # vLLM finds stop strings in the text only
        # Without these vLLM makes several objects for each token of each request.
        "output_kind": RequestOutputKind.FINAL_ONLY,
        "flat_logprobs": True,
        "skip_clone": True,  # the parameters are this request's own
    }
    if sampling.structured_outputs is not None:
        kwargs["structured_outputs"] = sampling.structured_outputs
    kwargs.update(sampling.extra)
    if isinstance(structured := kwargs.get("structured_outputs"), Mapping):
        try:
            kwargs["structured_outputs"] = StructuredOutputsParams(**structured)
        except (TypeError, ValueError) as error:
            raise ValueError(f"vLLM refused Sampling.structured_outputs: {error}") from error
    return SamplingParams(**kwargs)


def require_readable(parameters: Any) -> None:
    """Raise `ValueError` for values that the engine's core could not read, which would end it.

    `SamplingParams` checks few types when it is made. Its message format checks all, but only in the core.
    """
    from vllm import SamplingParams
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    try:
        MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(parameters))
    except Exception as error:  # msgspec's, and those of the hooks of vLLM for other types
        raise ValueError(f"vLLM cannot read Sampling.extra: {error}") from error
