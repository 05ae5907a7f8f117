"""What each rank of `test_ranks_in_process.py` runs under torchrun: `ranks_worker.py MODEL TENSOR_PARALLEL_SIZE`."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from vgen import ColocateGeneration, ProfilingContext, Sampling
from vgen.demo import max_logprob_difference
from vgen.profiling import semconv
from vgen.testing import MemorySink


def main(path: str, tensor_parallel_size: int) -> dict:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(5)  # alike on both ranks, as careless trainers do
    sink = MemorySink()
    generation = ColocateGeneration(
        model,
        processing_class=tokenizer,
        tensor_parallel_size=tensor_parallel_size,
        enable_sleep_mode=True,
        max_model_length=128,
        profiling=ProfilingContext([sink]),
        engine_kwargs={"kv_cache_memory_bytes": 16 << 20},
    )
    names = sorted(name for name in os.listdir("/dev/shm") if "cpushm" in name)
    left_by_a_crash = [name for name in names if name.startswith(("-tp", "vgen-"))]  # servers have other names
    prompts = [[1, 2, 3], [], [4, 5]] if rank == 0 else [[9, 8, 7, 6]]
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    done: list[int] = []
    first = generation.generate(
        prompts, sampling, 2, refused="mark", on_completion=lambda c: done.append(c.prompt_index)
    )
    same = generation.generate([[3, 3, 3]], sampling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
            dist.broadcast(parameter.data, 0)
    generation.sync_weights()
    after = generation.generate([[7, 7]] if rank == 0 else [], sampling)
    generation.sleep(2)
    generation.wake_up()
    woken = generation.generate([[6]], sampling)
    differences = [max_logprob_difference(model, found) for found in (after, woken)]
    generation.close()
    dist.barrier()
    still = dist.is_initialized()
    dist.destroy_process_group()
    return {
        "rank": rank,
        "lengths": [len(completion.token_ids) for completion in first],
        "prompt_ids": first.prompt_ids,
        "done": sorted(done),
        "same": same[0].token_ids,
        "after": len(after),
        "difference": max(differences),
        "span_ranks": sorted({span.attributes[semconv.RANK] for span in sink.spans}),
        "group_kept": still,
        "left_by_a_crash": left_by_a_crash,
    }


if __name__ == "__main__":
    result = main(sys.argv[1], int(sys.argv[2]))
    with open(os.path.join(sys.argv[3], f"rank-{result['rank']}.json"), "w") as file:
        json.dump(result, file)
