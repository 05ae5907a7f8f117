"""Tiny models of many architectures, with random weights, as a trainer would have them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t

_TEXT: dict[str, Any] = dict(
    vocab_size=272,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=256,
    pad_token_id=0,
)
_MOE: dict[str, Any] = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
_MLA: dict[str, Any] = dict(
    kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, moe_intermediate_size=64
)
_DEEPSEEK: dict[str, Any] = dict(
    **_MLA, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=1, n_shared_experts=1
)
_MAMBA: dict[str, Any] = dict(num_heads=8, head_dim=32, n_groups=1, state_size=16)

CONFIGS: dict[str, Any] = {
    "llama": lambda: t.LlamaConfig(**_TEXT),
    "llama_bias": lambda: t.LlamaConfig(**_TEXT, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: t.Qwen2Config(**_TEXT, tie_word_embeddings=False),
    "qwen2_tied": lambda: t.Qwen2Config(**_TEXT, tie_word_embeddings=True),
    "qwen3": lambda: t.Qwen3Config(**_TEXT, head_dim=32),
    "gpt2": lambda: t.GPT2Config(
        vocab_size=272, n_embd=128, n_layer=2, n_head=4, n_positions=256, bos_token_id=256, eos_token_id=256
    ),
    "opt": lambda: t.OPTConfig(
        vocab_size=272,
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=128,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=1,
    ),
    "bloom": lambda: t.BloomConfig(
        vocab_size=272,
        hidden_size=128,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
        tie_word_embeddings=True,
    ),
    "falcon": lambda: t.FalconConfig(
        vocab_size=272,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        new_decoder_architecture=False,
        multi_query=True,
        parallel_attn=True,
        alibi=False,
        bias=False,
        bos_token_id=256,
        eos_token_id=256,
    ),
    "phi3": lambda: t.Phi3Config(**_TEXT),
    "gemma": lambda: t.GemmaConfig(**_TEXT, head_dim=32),
    "gemma2": lambda: t.Gemma2Config(
        **_TEXT, head_dim=32, query_pre_attn_scalar=32, sliding_window=64, attn_implementation="eager"
    ),
    "gemma3": lambda: t.Gemma3TextConfig(**_TEXT, head_dim=32, query_pre_attn_scalar=32, sliding_window=64),
    "cohere": lambda: t.CohereConfig(**_TEXT),
    "granite": lambda: t.GraniteConfig(**_TEXT),
    "stablelm": lambda: t.StableLmConfig(**_TEXT),
    "olmo2": lambda: t.Olmo2Config(**_TEXT),
    "mixtral": lambda: t.MixtralConfig(**_TEXT, num_local_experts=4),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**_TEXT, **_MOE, shared_expert_intermediate_size=64, decoder_sparse_step=1),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**_TEXT, **_MOE, head_dim=32),
    "glm4_moe": lambda: t.Glm4MoeConfig(
        **_TEXT,
        head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
    ),
    "granitemoehybrid": lambda: t.GraniteMoeHybridConfig(
        **_TEXT,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_expand=2,
        position_embedding_type="rope",
    ),
    "mamba": lambda: t.MambaConfig(
        vocab_size=272, hidden_size=128, state_size=16, num_hidden_layers=2, bos_token_id=256, eos_token_id=256
    ),
    "mamba2": lambda: t.Mamba2Config(
        vocab_size=272, hidden_size=128, num_hidden_layers=2, expand=2, bos_token_id=256, eos_token_id=256, **_MAMBA
    ),
    "falcon_h1": lambda: t.FalconH1Config(
        **_TEXT, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_expand=1
    ),
    "deepseek_v2": lambda: t.DeepseekV2Config(
        **{**_TEXT, "num_key_value_heads": 4},
        **_DEEPSEEK,
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    ),
    "deepseek_v3": lambda: t.DeepseekV3Config(
        **{**_TEXT, "num_key_value_heads": 4}, **_DEEPSEEK, q_lora_rank=32, n_group=1, topk_group=1
    ),
    "lfm2": lambda: t.Lfm2Config(**_TEXT, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "qwen3_next": lambda: t.Qwen3NextConfig(
        **_TEXT,
        **_MOE,
        head_dim=32,
        shared_expert_intermediate_size=64,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        layer_types=["linear_attention", "full_attention"],
    ),
    "gpt_oss": lambda: t.GptOssConfig(
        **_TEXT,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "jamba": lambda: t.JambaConfig(
        **_TEXT,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        mamba_dt_rank=16,
        use_mamba_kernels=False,
    ),
    "dbrx": lambda: t.DbrxConfig(
        vocab_size=272,
        d_model=128,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        attn_config=dict(kv_n_heads=2, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    ),
    "gpt_neox": lambda: t.GPTNeoXConfig(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=256,
    ),
    "starcoder2": lambda: t.Starcoder2Config(**_TEXT),
    "smollm3": lambda: t.SmolLM3Config(**_TEXT),
}


def family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of that architecture in evaluation mode, its weights not those of any checkpoint."""
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype).eval()
    model.config.architectures = [type(model).__name__]
    refresh(model, seed)
    return model


@torch.no_grad()
def refresh(model: Any, seed: int) -> None:
    """Give every parameter other values: matrices by their fan-in, vectors near what they were."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() <= 1 or "A_log" in name:
            parameter.add_((0.2 * noise).to(parameter))
        else:
            parameter.copy_((noise * (0.6 / parameter.shape[-1] ** 0.5)).to(parameter))
        if name.endswith("kv_a_proj_with_mqa.weight") and parameter.device.type == "cpu":
            # vLLM's CPU build rotates the positions of MLA in another way than its GPU build and transformers, also
            # when it loads a checkpoint itself. Without the rotated part of the keys the rest can be compared.
            parameter[-model.config.qk_rope_head_dim :].zero_()
