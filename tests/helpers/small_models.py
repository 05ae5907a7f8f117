"""Tiny models of several architectures, and a check that every engine must pass with them."""

from __future__ import annotations

import torch

from vgen import Sampling
from vgen.demo import max_logprob_difference
from vgen.testing import byte_tokenizer, tiny_model

PROMPTS = [[1, 2, 3], list(range(60)), [7] * 30]


def _llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    return _saved(LlamaForCausalLM(LlamaConfig(**_fields(LlamaForCausalLM))), folder)


def _experts(folder):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    own = dict(head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    return _saved(Qwen3MoeForCausalLM(Qwen3MoeConfig(**_fields(Qwen3MoeForCausalLM), **own)), folder)


def bloom(folder):
    """A tiny Bloom. It is not in `MODELS`, because vLLM refuses the name of its tied head."""
    from transformers import BloomConfig, BloomForCausalLM

    fields = dict(vocab_size=272, hidden_size=128, n_layer=2, n_head=4, eos_token_id=256, bos_token_id=None)
    fields |= dict(pad_token_id=257, tie_word_embeddings=True, architectures=["BloomForCausalLM"])
    return _saved(BloomForCausalLM(BloomConfig(**fields)), folder)


def _fields(kind):
    fields = dict(vocab_size=272, hidden_size=128, intermediate_size=256, num_hidden_layers=2, eos_token_id=256)
    fields |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None)
    return fields | dict(pad_token_id=257, tie_word_embeddings=False, architectures=[kind.__name__])


def _saved(model, folder):
    model = model.float()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


MODELS = {
    "qwen2": lambda folder: tiny_model(folder)[0],
    "tied": lambda folder: tiny_model(folder, tie_word_embeddings=True)[0],
    "padded": lambda folder: tiny_model(folder, vocab_size=270)[0],
    "llama": _llama,
    "experts": _experts,
}


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)


def three_times(model, generation, tolerance=1e-4):
    for _ in range(3):
        warm = generation.generate(PROMPTS, Sampling(max_tokens=8))  # fills the prefix cache from the old weights
        randomize(model)
        assert max_logprob_difference(model, warm) > 10 * tolerance
        generation.sync_weights()
        assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) <= tolerance
