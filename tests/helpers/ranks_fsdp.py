"""What each rank of an FSDP2 trainer in `test_ranks_server.py` runs: `ranks_fsdp.py MODEL URL FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from helpers.ranks_server import connected
from vgen import Sampling
from vgen.demo import max_logprob_difference
from vgen.profiling import semconv
from vgen.testing import MemorySink

PROMPTS = ([[1, 2, 3], [4, 5]], [[9, 8, 7, 6]])


def sharded(path: str) -> Any:
    """The saved model, each layer of it sharded over all ranks."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(model: Any, path: str) -> Any:
    """A plain copy of the sharded model, on every rank."""
    copy = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    copy.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return copy


def main(path: str, url: str) -> dict:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = sharded(path)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0)
    sink = MemorySink()
    generation = connected(model, url, sink)
    sampling = Sampling(max_tokens=8, ignore_eos=True, seed=3)
    before = whole(model, path)
    found: dict[str, Any] = {"rank": rank, "own": [], "stale": [], "prompts": [], "versions": []}
    for version in ("one", "two"):
        ids = torch.tensor([[5, 6 + rank, 7, 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        generation.sync_weights(version=version)
        rollouts = generation.generate(PROMPTS[rank], sampling, 2)
        now = whole(model, path)
        found["own"].append(max_logprob_difference(now, rollouts))
        found["stale"].append(max_logprob_difference(before, rollouts))
        found["prompts"].append(rollouts.prompt_ids)
        found["versions"].append(sorted({completion.weight_version for completion in rollouts}))
        before = now
    generation.close()
    found["verified"] = [span.attributes.get(semconv.VERIFY) for span in sink.named(semconv.WEIGHT_SYNC)]
    dist.barrier()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    result = main(*sys.argv[1:3])
    with open(os.path.join(sys.argv[3], f"rank-{result['rank']}.json"), "w") as file:
        json.dump(result, file)
