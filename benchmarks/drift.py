"""What the drift monitor costs: its seconds of a whole training step, compared after every sync, on this device.

    python benchmarks/drift.py --json --size 1.5b --prompts 64 --tokens 256

A step is what a trainer of this kind does: generate, one forward and backward pass over all completions, an optimizer
step, a weight sync. The monitor is timed by itself, with the device synchronized before and after it, because the
ratio of two whole steps cannot be measured to half a percent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch

from vgen import ColocateGeneration, ProfilingContext, Sampling
from vgen.generation.drift import DriftMonitor
from vgen.profiling import semconv
from vgen.testing import MemorySink, tiny_model

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "1.5b": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    monitor: list[float] = []
    observe = DriftMonitor.observe

    def timed(self: DriftMonitor, *args: Any) -> None:
        synchronize()
        start = time.perf_counter()
        observe(self, *args)
        synchronize()
        monitor.append(time.perf_counter() - start)

    DriftMonitor.observe = timed  # type: ignore[method-assign]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = [[1 + (i * 31 + j) % 250 for j in range(128)] for i in range(options.prompts)]
    sampling, sink, steps = Sampling(max_tokens=options.tokens, ignore_eos=True), MemorySink(), []
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(folder, **SIZES[options.size])[0].to(device, torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        with ColocateGeneration(
            model,
            max_model_length=1024,
            gpu_memory_utilization=0.3,
            drift_every=1,
            profiling=ProfilingContext([sink]),
        ) as generation:
            for _ in range(options.steps + 2):
                synchronize()
                start = time.perf_counter()
                completions = generation.generate(prompts, sampling)
                ids = torch.tensor(
                    [prompt + each.token_ids for prompt, each in zip(prompts, completions, strict=True)], device=device
                )
                for batch in ids.split(8):
                    model(batch, labels=batch).loss.backward()
                optimizer.step(), optimizer.zero_grad()
                generation.sync_weights()
                synchronize()
                steps.append(time.perf_counter() - start)
    compared = [span.attributes.get(semconv.DRIFT_MEAN) for span in sink.named(semconv.GENERATE)]
    cost, whole = statistics.median(monitor[2:]), statistics.median(steps[2:])
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "size": options.size,
        "prompts": options.prompts,
        "tokens": options.tokens,
        "monitor_seconds": cost,
        "step_seconds": whole,
        "share": cost / whole,
        "compared": sum(each is not None for each in compared[2:]),
        "steps": options.steps,
    }
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{cost * 1e3:.2f} ms of a step of {whole:.3f} s: {cost / whole:.2%}, {result['compared']} comparisons")


if __name__ == "__main__":
    main()
