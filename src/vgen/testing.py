"""For tests, yours too: a model small enough to make on the spot, and a sink that remembers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .profiling.sinks.memory import MemorySink

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["MemorySink", "byte_tokenizer", "tiny_model"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer made without any download: one token for each byte (0 to 255), `<eos>` 256 and `<pad>` 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": 256, "<pad>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_model(
    directory: str | Path, *, seed: int = 0, **config: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A Qwen2 with random float32 weights and 0.3 M parameters, saved with its tokenizer so that vLLM can load it.

    `config` overrides fields of `Qwen2Config`. The head size is 32, the least that vLLM's CPU attention takes.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    fields: dict[str, Any] = dict(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
        architectures=["Qwen2ForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(**fields | config)).float()
    tokenizer = byte_tokenizer()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model.config._name_or_path = str(directory)
    return model, tokenizer
