"""Models of any architecture that transformers knows, made tiny on the spot, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import CheckError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY, POSITIONS = 272, 512
_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "mlp_hidden_size"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels"), 32),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), POSITIONS
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_ffn_size", "moe_ffn_hidden_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 64),
    **dict.fromkeys(("q_lora_rank",), 32),
    **dict.fromkeys(("kv_lora_rank",), 512),
    **dict.fromkeys(("qk_rope_head_dim",), 64),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 128),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 16),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("eos_token_id",), VOCABULARY - 16),
}
"""The sizes of a tiny model, by the names that configurations have for them. 32 is the smallest head on a CPU."""
_AT_MOST = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_group", "topk_group", "q_lora_rank")
"""Sizes that may be smaller in the full model: one head of keys for all, no groups of experts."""
_OF_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "bloom": dict(pad_token_id=257),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": dict(
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    ),
    "falcon": dict(num_kv_heads=1, ffn_hidden_size=512),
    "falcon_h1": dict(mamba_d_ssm=128, mamba_d_head=16, mamba_expand=1),
    "gemma3n_text": dict(num_kv_shared_layers=0, vocab_size_per_layer_input=VOCABULARY),
    "glm4_moe": dict(head_dim=32),
    "gptj": dict(rotary_dim=32),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], mamba_expand=2, position_embedding_type="rope"),
    "hunyuan_v1_dense": dict(head_dim=32),
    "hunyuan_v1_moe": dict(head_dim=32),
    "jamba": dict(
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(expand=2, num_heads=8, head_dim=32),
    "opt": dict(pad_token_id=1),
    "qwen2_moe": dict(decoder_sparse_step=1),
    "qwen3_next": dict(layer_types=["linear_attention", "full_attention"]),
}
"""What an architecture needs beside small sizes, by its `model_type`."""


def architectures() -> dict[str, str]:
    """The causal language models that transformers knows: the name of each class, by `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return {kind: classes if isinstance(classes, str) else classes[0] for kind, classes in names.items()}


def tiny_config(model_type: str, **fields: Any) -> PretrainedConfig:
    """A configuration of that architecture with two layers and 272 tokens. `fields` override what is chosen here.

    Raises `CheckError` if transformers does not know the architecture.
    """
    from transformers import AutoConfig

    if model_type not in architectures():
        near = ", ".join(sorted(name for name in architectures() if name[:3] == model_type[:3])) or "llama, qwen3_moe"
        raise CheckError(
            f"{model_type!r} is neither a folder with a config.json nor an architecture that transformers knows: pass "
            f"a folder, a hub name, or a model_type such as {near}"
        )
    full = AutoConfig.for_model(model_type)
    if full.get_text_config() is not full:  # of a model that also sees: only its language model is made
        full = full.get_text_config()
    return type(full)(**_shrunk(full, full.model_type) | fields)


def _shrunk(full: Any, model_type: str) -> dict[str, Any]:
    given, fields = full.to_dict(), dict[str, Any]()
    for name, value in given.items():
        if name in _SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            fields[name] = min(value, _SIZES[name]) if name in _AT_MOST else _SIZES[name]
        elif name == "num_key_value_heads" and value is None:
            fields[name] = _SIZES["num_attention_heads"]
        elif name in ("bos_token_id", "pad_token_id") and isinstance(value, int) and value >= VOCABULARY:
            fields[name] = 0
        elif isinstance(value, list) and name.endswith(("layer_types", "layers_block_type")):
            fields[name] = _two_kinds(value)
    if "qk_rope_head_dim" in fields:  # multi-head latent attention has no groups, and rotates this part of a head
        heads = {"num_key_value_heads": _SIZES["num_attention_heads"], "head_dim": fields["qk_rope_head_dim"]}
        fields |= {name: value for name, value in heads.items() if name in given}
    return fields | {"eos_token_id": VOCABULARY - 16} | _OF_ARCHITECTURE.get(model_type, {})


def _two_kinds(layers: list[Any]) -> list[Any]:
    """The first two kinds of layers, or one kind twice."""
    return (list(dict.fromkeys(layers)) * 2)[:2]


def tiny_model(model_type: str, *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A model of that architecture in float32 and evaluation mode, with weights as if it were trained.

    `fields` are of its configuration. torch's global random state stays as it is. Raises `CheckError` as `tiny_config`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from .training import randomize

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Not every attention that transformers can call computes all that a configuration asks for (Gemma's soft caps).
        config = tiny_config(model_type, **fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.config.architectures = [type(model).__name__]
    randomize(model, seed)
    return model
