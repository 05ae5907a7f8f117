"""For tests, yours too: a model small enough to make on the spot, an engine without a model, a sink that remembers."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engines.base import Phase, Request, Source
from .profiling.sinks.memory import MemorySink
from .types import Completion, RequestTiming, Sampling, SleepReport

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["FakeEngine", "MemorySink", "byte_tokenizer", "tiny_model"]


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


class FakeEngine:
    """An `Engine` without a model, for injecting faults: `raises["sleep"] = OSError()` makes `sleep` raise that.

    It answers every request with the request's own prompt, keeps the weights it was sent in `weights`,
    and the names of the calls in `calls`. `Generation(FakeEngine(), source=[])` is all it takes.
    """

    kind = "fake"
    device_type = "cpu"

    def __init__(self, *, max_model_length: int = 64, vocabulary_size: int = 100) -> None:
        self.max_model_length, self.vocabulary_size = max_model_length, vocabulary_size
        self.raises: dict[str, BaseException] = {}
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.version = "0"

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Completion]:
        self._called("stream")
        for request in requests:
            yield self._completion(request, sampling)

    def sync(self, source: Source, version: str, phase: Phase) -> None:
        with phase("load"):
            self._called("load")
            self.weights = dict(source)
        with phase("reset_cache"):
            self._called("reset_cache")
        self.version = version

    def sleep(self, level: int) -> SleepReport:
        self._called("sleep")
        return SleepReport(memory_freed=True, device_bytes=1 << 20)

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        self._called("wake_up")
        return SleepReport(memory_freed=True, device_bytes=1 << 20)

    def close(self) -> None:
        self._called("close")

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if call in self.raises:
            raise self.raises[call]

    def _completion(self, request: Request, sampling: Sampling) -> Completion:
        now = time.monotonic_ns()
        token_ids = list(request.token_ids)[: sampling.max_tokens]
        timing = RequestTiming(
            queued_ns=now - 4_000_000,
            finished_ns=now,
            queue=0.001,
            prefill=0.001,
            decode=0.002,
            time_to_first_token=0.002,
            time_per_output_token=0.001,
            e2e=0.004,
        )
        return Completion(
            prompt_index=request.prompt_index,
            generation_index=request.generation_index,
            token_ids=token_ids,
            logprobs=[0.0 for _ in token_ids],
            finish_reason="length",
            weight_version=self.version,
            request_id=f"fake-{request.prompt_index}-{request.generation_index}",
            timing=timing,
        )
