"""What each rank of `test_ranks_server.py` runs: `ranks_server.py MODEL FRESH URL FOLDER`; the keys are in variables.

The trainer's model is a bare module with a checkpoint's parameters: no rank needs its forward here, and transformers
takes long to import.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from vgen import Completions, ProfilingContext, Sampling, ServerConnection, ServerGeneration
from vgen.profiling import semconv
from vgen.testing import MemorySink

PROMPTS = ([[1, 2, 3], [], [4, 5]], [[9, 8, 7, 6]])


def bare_module(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    root = torch.nn.Module()
    root.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=272))  # pyright: ignore
    for name, tensor in weights.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(tensor))
    return root


def shown(completions: Completions) -> list[dict]:
    return [
        {
            "prompt": completions.prompt_ids[c.prompt_index],
            "tokens": c.token_ids,
            "logprobs": c.logprobs,
            "version": c.weight_version,
            "timed": c.timing is not None,
            "error": None if c.error is None else str(c.error),
        }
        for c in completions
    ]


def connected(model: torch.nn.Module, url: str, sink: MemorySink) -> ServerGeneration:
    keys: Any = {"api_key": os.environ["API_KEY"], "control_key": os.environ["CONTROL_KEY"]}
    keys["connection"] = ServerConnection(timeout=120.0)
    return ServerGeneration(model, base_urls=[url], profiling=ProfilingContext([sink]), **keys)


def main(path: str, fresh: str, url: str) -> dict:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    weights = load_file(os.path.join(path, "model.safetensors"))
    model = bare_module(weights)
    sink = MemorySink()
    generation = connected(model, url, sink)
    held = generation.engine.weight_version

    def train(to: dict[str, torch.Tensor], version: str | None) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(to[name])
        generation.sync_weights(version=version)

    weights = {name: tensor.clone() for name, tensor in weights.items()}
    train(weights, held)  # whoever came before may have left others
    sampling = Sampling(max_tokens=8, ignore_eos=True, seed=3)
    first = generation.generate(PROMPTS[rank], sampling, 2, refused="mark")
    train(load_file(fresh), "fresh")
    after = generation.generate([[7, 7]] if rank == 1 else [], sampling)
    score = generation.score([[5, 6]], [[7, 8 + rank]])
    train(weights, held)
    generation.close()
    (generate, *_), (scatter, *_) = sink.named(semconv.GENERATE), sink.named(semconv.RANKS_SCATTER)
    return {
        "rank": rank,
        "first": shown(first),
        "after": shown(after),
        "score": score,
        "bytes": scatter.attributes[semconv.RANKS_BYTES],
        "links": len(generate.links),
    }


if __name__ == "__main__":
    result = main(*sys.argv[1:4])
    with open(os.path.join(sys.argv[4], f"rank-{result['rank']}.json"), "w") as file:
        json.dump(result, file)
