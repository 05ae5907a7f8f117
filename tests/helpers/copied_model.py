"""A third party's "engine" and weight sync in few lines: a copy of the model, sampled by transformers' forward."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch


class CopiedModel:
    """A `WeightSyncSubject`. Subclasses break its sync in one way each."""

    concurrent = False

    def __init__(self, model: torch.nn.Module, folder: str, **options: Any) -> None:
        self.engine: Any = copy.deepcopy(model).eval()
        self.closed = False

    def sync(self, model: torch.nn.Module) -> None:
        weights = dict(self.weights_of(model))
        if weights.keys() != self.engine.state_dict().keys():
            raise ValueError(f"unknown tensors: {sorted(weights.keys() ^ self.engine.state_dict().keys())}")
        self.engine.load_state_dict(weights)
        embedding, head = self.engine.get_input_embeddings(), self.engine.get_output_embeddings()
        if embedding.weight is head.weight and not torch.equal(weights["lm_head.weight"], embedding.weight):
            raise ValueError("the model's head is not tied any more")
        theirs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if embedding.weight is head.weight and not torch.equal(*theirs):
            raise ValueError("the model's head is not tied any more")

    def weights_of(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return model.state_dict()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float) -> list[Any]:
        generator, answers = torch.Generator().manual_seed(0), {}
        for length in {len(prompt) for prompt in prompts}:
            places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
            ids, logprobs, past = torch.tensor([list(prompts[place]) for place in places]), [], None
            for _ in range(max_tokens):
                output = self.engine(ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
                rows, past = output.logits[:, -1].float().log_softmax(-1), output.past_key_values
                if temperature == 0:
                    tokens = rows.argmax(-1, keepdim=True)
                else:
                    tokens = torch.multinomial(rows.exp(), 1, generator=generator)
                ids = torch.cat([ids, tokens], 1)
                logprobs.append(rows.gather(1, tokens))
            for row, place in enumerate(places):
                answers[place] = ids[row, length:].tolist(), torch.cat(logprobs, 1)[row].tolist()
        return [answers[place] for place in range(len(prompts))]

    def close(self) -> None:
        self.closed = True
