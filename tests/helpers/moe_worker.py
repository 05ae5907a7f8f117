"""A process of `test_adapters_and_experts.py`: three syncs of a Qwen3-MoE with adapters, printed as JSON."""

from __future__ import annotations

import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from vgen import ColocateGeneration, Sampling
from vgen.demo import max_logprob_difference
from vgen.testing import byte_tokenizer

PROMPTS = [[1, 2, 3, 4, 5], list(range(40)), [7]]
SAMPLING = Sampling(max_tokens=16, ignore_eos=True)


def main() -> dict:
    config = Qwen3MoeConfig(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=experts)
    model = get_peft_model(Qwen3MoeForCausalLM(config).eval(), lora)
    small = {"kv_cache_memory_bytes": 16 << 20}
    differences, stale, tensors = [], [], 0
    with ColocateGeneration(
        model, processing_class=byte_tokenizer(), max_model_length=128, engine_kwargs=small
    ) as generation:
        for _ in range(3):
            before = generation.generate(PROMPTS, SAMPLING)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.randn_like(parameter) * (0.2 if "lora_" in name else 0.1))
            tensors = generation.sync_weights().tensors
            stale.append(max_logprob_difference(model, before))
            differences.append(max_logprob_difference(model, generation.generate(PROMPTS, SAMPLING)))
    return {"differences": differences, "stale": stale, "tensors": tensors}


if __name__ == "__main__":
    print(json.dumps(main()))
