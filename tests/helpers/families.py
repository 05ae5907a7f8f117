"""Tiny models of many architectures: those that `vgen check` makes, some with other fields, and their weights."""

from __future__ import annotations

from typing import Any

import torch

from vgen.checks.architectures import tiny_model
from vgen.checks.training import randomize

OTHER_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=False)),
    "qwen2_tied": ("qwen2", dict(tie_word_embeddings=True)),
    "gemma3": ("gemma3_text", {}),
    "jamba": ("jamba", dict(num_experts=4)),
    "mixtral": ("mixtral", dict(num_local_experts=4)),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=4, head_dim=64)),
}
"""The `model_type` and fields of its configuration, by name. Other names are a `model_type` each."""
FAMILIES = (
    *("llama", "llama_bias", "qwen2", "qwen2_tied", "qwen3", "gpt2", "opt", "bloom", "falcon", "phi3", "gemma"),
    *("gemma2", "gemma3", "cohere", "granite", "stablelm", "olmo2", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"),
    *("granitemoehybrid", "mamba", "mamba2", "falcon_h1", "deepseek_v2", "deepseek_v3", "lfm2", "qwen3_next"),
    *("gpt_oss", "jamba", "dbrx", "gpt_neox", "starcoder2", "smollm3"),
)


def family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A model of that architecture in evaluation mode, its weights not those of any checkpoint.

    `more` are fields of its configuration.
    """
    kind, fields = OTHER_FIELDS.get(name, (name, {}))
    model: Any = tiny_model(kind, seed=seed, **fields | more)
    return _without_rotated_keys(model.to(dtype))


def refresh(model: Any, seed: int) -> None:
    """Give every parameter other values: matrices by their fan-in, vectors near what they were."""
    randomize(model, seed)
    _without_rotated_keys(model)


@torch.no_grad()
def _without_rotated_keys(model: Any) -> Any:
    """On a CPU, the model without the part of latent attention's keys that depends on positions.

    vLLM's CPU build rotates it in another way than its GPU build and transformers, also when it loads a checkpoint
    itself. The rest can be compared.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("kv_a_proj_with_mqa.weight") and parameter.device.type == "cpu":
            parameter[-model.config.qk_rope_head_dim :].zero_()
    return model
