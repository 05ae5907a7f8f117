"""Tiny models of the architectures that transformers knows."""

from __future__ import annotations

import pytest
import torch

from vgen.checks.architectures import VOCABULARY, architectures, tiny_config, tiny_model
from vgen.errors import CheckError


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mamba2", "deepseek_v2", "gemma3_text", "falcon_h1", "gpt2"])
def test_a_tiny_model_computes_and_is_tiny(name):
    before = torch.random.get_rng_state()
    model = tiny_model(name)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sum(parameter.numel() for parameter in model.parameters()) < 4e6
    assert type(model).__name__ == architectures()[name] == model.config.architectures[0]
    with torch.no_grad():
        assert model(torch.arange(20)[None]).logits.shape == (1, 20, VOCABULARY)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_seed_decides_the_weights():
    first, second, third = (tiny_model("llama", seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_fields_override_what_is_chosen():
    config = tiny_config("llama", tie_word_embeddings=True, num_hidden_layers=3)
    assert (config.tie_word_embeddings, config.num_hidden_layers, config.vocab_size) == (True, 3, VOCABULARY)


def test_both_kinds_of_layers_are_there():
    assert set(tiny_config("gemma2").layer_types) == {"sliding_attention", "full_attention"}
    assert set(tiny_config("qwen3_next").layer_types) == {"linear_attention", "full_attention"}


def test_an_unknown_architecture_names_near_ones():
    with pytest.raises(CheckError, match=r"'qwen9' is neither a folder.*qwen2"):
        tiny_config("qwen9")
