"""What each rank of `test_ranks_sharded.py` runs under torchrun: `ranks_sharded.py MODEL TENSOR_PARALLEL_SIZE FOLDER`.

An FSDP2 trainer with vLLM in its own processes: an engine for each rank, or one that both are the workers of.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from helpers.ranks_fsdp import sharded, whole
from vgen import ColocateGeneration, ProfilingContext, Sampling, WeightSyncError
from vgen.demo import max_logprob_difference
from vgen.profiling import semconv
from vgen.testing import MemorySink


def main(path: str, tensor_parallel_size: int) -> dict:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = sharded(path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sink = MemorySink()
    generation = ColocateGeneration(
        model,
        tensor_parallel_size=tensor_parallel_size,
        enable_sleep_mode=True,
        max_model_length=128,
        profiling=ProfilingContext([sink]),
        engine_kwargs={"kv_cache_memory_bytes": 16 << 20},
    )
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    found: dict[str, Any] = {"rank": rank, "own": [], "stale": []}
    before = whole(model, path)

    def step() -> None:
        ids = torch.tensor([[5, 6 + rank, 7, 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def look() -> None:
        nonlocal before
        rollouts, now = generation.generate([[1 + rank, 2, 3]], sampling, 2), whole(model, path)
        found["own"].append(max_logprob_difference(now, rollouts))
        found["stale"].append(max_logprob_difference(before, rollouts))
        before = now

    for _ in range(2):
        step()
        generation.sync_weights()
        look()
    generation.sleep(2)
    step()
    generation.wake_up(["weights"])
    generation.sync_weights(verify="logprobs")
    generation.wake_up(["kv_cache"])
    look()
    # What fails on rank 1 alone, before it has taken anything of the model, in the middle, and after all of it.
    load, found["failed"] = generation.engine._load, []

    class Cut:
        def __init__(self, source: Any, count: int) -> None:
            self._source, self._count = source, count

        def __getattr__(self, name: str) -> Any:
            return getattr(self._source, name)

        def __iter__(self) -> Any:
            for number, item in enumerate(self._source):
                if number == self._count:
                    raise WeightSyncError("as injected", phase="load", parameter=item[0], receiver="colocate")
                yield item
            raise WeightSyncError("as injected", phase="load", receiver="colocate")

    for count in (0, 5, 1000):
        if rank == 1:
            generation.engine._load = lambda source, verify, count=count: load(Cut(source, count), verify)
        try:
            generation.sync_weights()
        except WeightSyncError as error:
            notes = getattr(error, "__notes__", [])
            found["failed"].append([error.problem, error.phase, error.receiver, notes, generation.state])
        generation.engine._load = load
        step()
        generation.sync_weights()
        look()
    generation.close()
    found["verified"] = [span.attributes.get(semconv.VERIFY) for span in sink.named(semconv.WEIGHT_SYNC)]
    found["woken"] = sink.named(semconv.WAKE_UP)[-1].attributes.get(semconv.VERIFY)
    dist.barrier()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    result = main(sys.argv[1], int(sys.argv[2]))
    with open(os.path.join(sys.argv[3], f"rank-{result['rank']}.json"), "w") as file:
        json.dump(result, file)
