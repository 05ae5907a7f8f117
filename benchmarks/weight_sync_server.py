"""The time of a weight sync to a server on this host, compared with a copy of the bytes and the engine's own load.

    python benchmarks/weight_sync_server.py            # a table: 500 M parameters in float32
    python benchmarks/weight_sync_server.py --json     # one JSON object

`memcpy` is one copy of the same number of bytes by all cores. `load` is the time that the server reports for its
engine's own reload, with all tensors in one bucket, so that nothing is transferred at the same time. `load_in_process`
is the same reload in a process that has the tensors and all cores; in a server, vLLM's scheduler occupies one of them.
`shared_memory` and `checkpoint` are whole `sync_weights()` calls to one `vgen serve`, without the first one, which
also verifies. The table has medians. Each sync brings fresh random weights, and afterwards the engine's
log-probabilities must equal the trainer model's, or the exit code is 1. The goal for shared memory is at most `load`
and twice `memcpy`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

PROMPTS = [[1, 2, 3], list(range(2, 60))]
TOLERANCE = 1e-3
LENGTH = 256


def make(folder: str, millions: int) -> Any:
    """A trainer's Qwen2 of about so many parameters in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from vgen.testing import byte_tokenizer

    fields: dict[str, Any] = dict(vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    fields |= dict(num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False)
    fields |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, architectures=["Qwen2ForCausalLM"])
    each = 1024 * (1024 * 2 + 256 * 2 + 3 * 4096)
    layers = max(1, round((millions * 1e6 - 2 * 32000 * 1024) / each))
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **fields)).float().eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model.config._name_or_path = folder
    return model


def randomize(model: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.03)


def memcpy(size: int, rounds: int) -> list[float]:
    """Seconds of each copy of `size` bytes, once both sides are in memory."""
    import torch

    value, place = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        place.copy_(value)
        found.append(time.perf_counter() - start)
    return found[1:]


def syncs(model: Any, generation: Any, rounds: int, seconds: Callable[[], float]) -> tuple[list[float], float]:
    """What each sync took, and how far the log-probabilities were off at most afterwards."""
    from vgen import Sampling
    from vgen.demo import max_logprob_difference

    found, worst = [], 0.0
    generation.sync_weights()  # the first is verified
    for _ in range(rounds):
        randomize(model)
        generation.sync_weights()
        found.append(seconds())
        worst = max(worst, max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=4))))
    return found, worst


def received(sink: Any) -> float:
    """Seconds that the server spent on the buckets of the last sync."""
    from vgen.profiling import semconv

    return sink.named(semconv.SYNC_TRANSFER)[-1].attributes[semconv.RECEIVER_MEDIAN]


def measure(millions: int, rounds: int) -> dict[str, Any]:
    from vgen import ColocateGeneration, ProfilingContext, ServerConnection, ServerGeneration, WeightSyncOptions
    from vgen.engines.server.launcher import start_server
    from vgen.profiling import semconv
    from vgen.testing import MemorySink

    sink = MemorySink()
    profiling = ProfilingContext([sink])

    def last(name: str) -> Callable[[], float]:
        return lambda: sink.named(name)[-1].duration or 0.0

    found: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    settings: dict[str, Any] = {"max_model_length": LENGTH, "engine_kwargs": {"kv_cache_memory_bytes": 64 << 20}}
    with tempfile.TemporaryDirectory() as folder:
        model = make(folder, millions)
        size = sum(parameter.numel() * 4 for parameter in model.parameters())
        found["memcpy"] = memcpy(size, rounds), 0.0
        with ColocateGeneration(model, weight_transport="reload", profiling=profiling, **settings) as generation:
            found["load_in_process"] = syncs(model, generation, rounds, last(f"{semconv.WEIGHT_SYNC}.load"))
        arguments = ["--max-model-len", str(LENGTH), "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)]
        with start_server(folder, arguments=arguments) as server:
            keys: dict[str, Any] = dict(base_urls=[server.url], control_key=server.control_key)
            keys["connection"] = ServerConnection(timeout=300.0)
            with ServerGeneration(
                model, profiling=profiling, weight_sync=WeightSyncOptions(bucket_bytes=2 * size), **keys
            ) as generation:
                found["load"] = syncs(model, generation, rounds, lambda: received(sink))
            for transport in ("shared_memory", "checkpoint"):
                with ServerGeneration(model, profiling=profiling, weight_transport=transport, **keys) as generation:
                    found[transport] = syncs(model, generation, rounds, last(semconv.WEIGHT_SYNC))
                span = sink.named(semconv.WEIGHT_SYNC)[-1]
                phases = {p.name.rpartition(".")[2]: p.duration for p in sink.spans if p.parent is span}
                attributes[transport] = {
                    "phases": phases,
                    semconv.PAUSED_SECONDS: span.attributes[semconv.PAUSED_SECONDS],
                }
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "parameters": size // 4,
        "bytes": size,
        "seconds": {way: values for way, (values, _) in found.items()},
        "median": {way: statistics.median(values) for way, (values, _) in found.items()},
        "max_logprob_difference": max(worst for _, worst in found.values()),
        "last": attributes,
    }


def show(result: dict[str, Any]) -> None:
    median = result["median"]
    allowed = median["load"] + 2 * median["memcpy"]
    print(f"{result['parameters'] / 1e6:.0f} M parameters in float32, {result['bytes'] / 1e9:.2f} GB\n")
    print("| | seconds | GB/s |\n|---|---:|---:|")
    for way, seconds in median.items():
        print(f"| {way} | {seconds:.3f} | {result['bytes'] / seconds / 1e9:.2f} |")
    print(f"\nload + 2 memcpy: {allowed:.3f} s; shared memory takes {median['shared_memory'] / allowed:.2f} of it")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=500, help="parameters of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    result = measure(asked.millions, asked.rounds)
    if asked.json:
        print(json.dumps(result))
    else:
        show(result)
    if result["max_logprob_difference"] > TOLERANCE:
        print(f"the weights are not the trainer's: {result['max_logprob_difference']:.2g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
