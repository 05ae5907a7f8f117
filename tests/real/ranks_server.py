"""What each rank of `test_ranks_server.py` runs: `ranks_server.py MODEL URL FOLDER`; the keys are in variables."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from vgen import ProfilingContext, Sampling, ServerGeneration
from vgen.demo import max_logprob_difference
from vgen.profiling import names
from vgen.testing import MemorySink

PROMPTS = ([[1, 2, 3], [], [4, 5]], [[9, 8, 7, 6]])


def main(path: str, url: str) -> dict:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    sink = MemorySink()
    generation = ServerGeneration(
        model,
        base_urls=[url],
        api_key=os.environ["API_KEY"],
        control_key=os.environ["CONTROL_KEY"],
        timeout=120.0,
        profiling=ProfilingContext([sink]),
    )
    held = generation.engine.weight_version
    sampling = Sampling(max_tokens=8, ignore_eos=True, seed=3)
    generation.sync_weights(version=held)  # whoever came before may have left others
    first = generation.generate(PROMPTS[rank], sampling, 2, refused="mark")
    before = max_logprob_difference(model, [c for c in first if c.error is None])
    known = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
            dist.broadcast(parameter.data, 0)
    generation.sync_weights(version="fresh")
    after = generation.generate([[7, 7]] if rank == 1 else [], sampling)
    score = generation.score([[5, 6]], [[7, 8 + rank]])
    different = max_logprob_difference(model, after) if rank == 1 else 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(known[name])
    generation.sync_weights(version=held)
    generation.close()
    scatter = sink.named(names.RANKS_SCATTER)[0]
    (generate, *_) = sink.named(names.GENERATE)
    return {
        "rank": rank,
        "prompts": first.prompt_ids,
        "tokens": [c.token_ids for c in first],
        "timed": [c.timing is not None for c in first],
        "difference": max(before, different),
        "after": len(after),
        "versions": [c.weight_version for c in after],
        "score": [len(found) for found in score],
        "bytes": scatter.attributes[names.RANKS_BYTES],
        "links": len(generate.links),
    }


if __name__ == "__main__":
    result = main(sys.argv[1], sys.argv[2])
    with open(os.path.join(sys.argv[3], f"rank-{result['rank']}.json"), "w") as file:
        json.dump(result, file)
