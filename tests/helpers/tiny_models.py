"""Models of a few thousand parameters, one of each kind that a source must know."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_TEXT: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)


def tiny(kind: str, seed: int = 0) -> Any:
    """A model of that kind, in float32, with the weights that `seed` gives it."""
    t = transformers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match kind:
            case "qwen2":
                return t.Qwen2ForCausalLM(t.Qwen2Config(**_TEXT, tie_word_embeddings=False))
            case "tied":
                return t.Qwen2ForCausalLM(t.Qwen2Config(**_TEXT, tie_word_embeddings=True))
            case "llama":
                return t.LlamaForCausalLM(t.LlamaConfig(**_TEXT))
            case "qwen3_moe":
                moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
                return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_TEXT, **moe))
            case "mixtral":
                return t.MixtralForCausalLM(t.MixtralConfig(**_TEXT, num_local_experts=4))
            case "deepseek_v3":  # its router has a buffer that the checkpoint holds
                routing = dict(n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, n_group=1)
                sizes = dict(moe_intermediate_size=16, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8)
                config = t.DeepseekV3Config(**_TEXT, **routing, **sizes, topk_group=1, qk_nope_head_dim=8)
                return t.DeepseekV3ForCausalLM(config)
            case "qwen2_vl":
                vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
                text = _TEXT | dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
                config = t.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
                return t.Qwen2VLForConditionalGeneration(config)
            case "gemma3":
                vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
                config = t.Gemma3Config(
                    text_config=_TEXT | dict(head_dim=8),
                    vision_config=vision | dict(image_size=28, patch_size=14),
                    mm_tokens_per_image=4,
                )
                return t.Gemma3ForConditionalGeneration(config)
    raise ValueError(kind)


def fill(model: Any, seed: int = 7, scale: float = 0.1) -> Any:
    """Random weights everywhere, so that no two tensors are alike and no adapter is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
