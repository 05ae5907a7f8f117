"""A third party's weight sync on real vLLM: an engine in this process, and vLLM's own `reload_weights`, without vgen.

Its subclasses break it in ways that were seen in the wild.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class PlainEngine:
    """The part of a `WeightSyncSubject` that only samples, with `self.llm`, a `vllm.LLM`."""

    llm: Any

    def generate(self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True, logprobs=0)
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=False)
        return [
            (each.token_ids, [at[token].logprob for token, at in zip(each.token_ids, each.logprobs, strict=True)])
            for each in (output.outputs[0] for output in outputs)
        ]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class ReloadWeights(PlainEngine):
    """A `WeightSyncSubject`, with an engine of its own or that of `other`, which then has the model's weights."""

    def __init__(self, model: torch.nn.Module, folder: str, other: ReloadWeights | None = None) -> None:
        if other is not None:
            self.llm = other.llm
            other.sync(model)
            self.close = lambda: None
            return
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self.llm = LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=384,
            max_num_seqs=16,
            kv_cache_memory_bytes=1 << 28,
            distributed_executor_backend="uni",
        )

    def sync(self, model: Any) -> None:
        weights = self.weights_of(model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.after_load()

    def after_load(self) -> None:
        self.llm.reset_prefix_cache()

    def weights_of(self, model: Any) -> list[tuple[str, torch.Tensor]]:
        # What save_pretrained writes, and a tied head under its own name.
        return [(name, tensor.detach().contiguous()) for name, tensor in model.state_dict().items()]


class ForgetsThePrefixCache(ReloadWeights):
    def after_load(self) -> None:
        pass


class SendsTrainedWeightsOnly(ReloadWeights):
    """The others keep what a reload leaves in them."""

    def weights_of(self, model):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return [(name, tensor) for name, tensor in super().weights_of(model) if name in trained]


class RemembersTheFirstTensors(ReloadWeights):
    def weights_of(self, model):
        if not hasattr(self, "first"):
            self.first = super().weights_of(model)
        return self.first


class SkipsVectors(ReloadWeights):
    """As filters by name do that were written for a model without biases."""

    def sync(self, model):
        if not hasattr(self, "vectors"):
            self.vectors = {name: t.clone() for name, t in super().weights_of(model) if t.dim() == 1}
        super().sync(model)

    def weights_of(self, model):
        kept = getattr(self, "vectors", {})
        return [(name, kept.get(name, tensor)) for name, tensor in super().weights_of(model)]


class SyncsEverySecondTime(ReloadWeights):
    calls = 0

    def sync(self, model):
        self.calls += 1
        if self.calls % 2:
            super().sync(model)


class DeltaByNorm(ReloadWeights):
    """Sends a tensor only if its norm has changed: a permutation, or a swap of experts, is not seen."""

    def weights_of(self, model):
        last, sent = getattr(self, "norms", {}), []
        self.sent = getattr(self, "sent", {})
        self.norms = {}
        for name, tensor in super().weights_of(model):
            self.norms[name] = round(float(tensor.norm()), 0)
            if self.norms[name] != last.get(name):
                self.sent[name] = tensor.clone()
            sent.append((name, self.sent[name]))
        return sent


def broken() -> Iterator[tuple[type[ReloadWeights], str]]:
    """Each broken sync, and a case that must catch it."""
    yield ForgetsThePrefixCache, "warm prefix cache"
    yield RemembersTheFirstTensors, "storage replaced"
    yield SkipsVectors, "only norms and biases are new"
    yield SyncsEverySecondTime, "second and third sync"
    yield DeltaByNorm, "only one layer is new"
    # Last, because vLLM's reload may remember layers that came in part, and get the next sync wrong.
    yield SendsTrainedWeightsOnly, "half of the weights frozen"
