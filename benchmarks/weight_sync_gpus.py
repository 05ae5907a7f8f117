"""The time of a weight sync to a server on GPUs, compared with one contiguous copy of the bytes.

    python benchmarks/weight_sync_gpus.py            # a table
    python benchmarks/weight_sync_gpus.py --json     # one JSON object

The model is a Qwen2 of 1.54 B parameters in bf16. The server is on the first GPU. The trainer's model is on the same
GPU (`resident`, `shared_memory`), then on the second one, if there is one (`nccl`; `nccl_1g` with buckets of 1 GiB).
`vllm_ipc` and `vllm_nccl` sync to stock servers, through vLLM's own engines. `sync` is a whole `sync_weights()`, with
pause, cache resets and resume; `live` is from its first send until the weights are in place. Each sync brings fresh
random weights, whose log-probabilities are then compared. `wrong` counts the syncs that differ; the exit code is then
1. The table has medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from weight_sync import TURN, Turn

START_SECONDS = 150.0
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
ARGUMENTS = ["--max-model-len", "1024", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(1 << 30)]
ARGUMENTS += ["--gpu-memory-utilization", "0.3", "--compilation-config", json.dumps(GRAPHS), "--enable-sleep-mode"]


def right(generation: Any, model: Any) -> bool:
    """Whether the server's log-probabilities are those of the trainer's model."""
    from vgen.weights.source.probe_forward import probe_logprobs
    from vgen.weights.verification.logprob_check import compare, probe_of, unit_of

    engine = generation.engine.endpoints[0]
    return bool(compare(engine, probe_logprobs(model, probe_of([engine], model), unit_of([engine]))).right)


def rounds(model: Any, generation: Any, sync: Callable[[], dict[str, float]], count: int) -> dict[str, Any]:
    import torch
    from weight_sync import randomize

    found, wrong = list[dict[str, float]](), 0
    for _ in range(count):
        randomize(model)
        torch.cuda.synchronize(next(model.parameters()).device)
        found.append(sync())
        wrong += not right(generation, model)
    seconds = {name: [each[name] for each in found] for name in found[0]}
    return {"median": {name: statistics.median(all) for name, all in seconds.items()}, "all": seconds, "wrong": wrong}


def ours(model: Any, url: str, key: str | None, transport: str, count: int, **options: Any) -> dict[str, Any]:
    from vgen import ProfilingContext, ServerConnection, ServerGeneration
    from vgen.profiling import semconv
    from vgen.testing import MemorySink

    sink = MemorySink()
    keys: dict[str, Any] = dict(base_urls=[url], control_key=key, connection=ServerConnection(timeout=60.0))
    keys |= dict(weight_transport=transport, profiling=ProfilingContext([sink]), **options)
    with ServerGeneration(model, **keys) as generation:

        def sync() -> dict[str, float]:
            generation.sync_weights()
            span = sink.named(semconv.WEIGHT_SYNC)[-1]
            phases = {p.name.rpartition(".")[2]: p.duration for p in sink.spans if p.parent is span}
            live = phases.get("transfer", 0.0) + phases["load"]
            return {"sync": span.duration, "live": live, "paused": span.attributes[semconv.PAUSED_SECONDS]} | phases

        start = time.perf_counter()
        generation.sync_weights()
        first = time.perf_counter() - start
        result = rounds(model, generation, sync, count)
        if transport == "resident":
            generation.sync_weights(verify="bits")
            generation.sleep(2)
            generation.wake_up()
            generation.sync_weights()
            result["wrong"] += not right(generation, model)  # after a level-2 sleep
    told = sink.named(semconv.WEIGHT_SYNC)[-1].attributes
    result |= {"way": told.get(semconv.PLAN_WAY), "plan_reason": told.get(semconv.PLAN_REASON)}
    if sent := sink.named(semconv.SYNC_TRANSFER):
        result["last_transfer"] = {name.removeprefix("vgen.weight_sync."): v for name, v in sent[-1].attributes.items()}
    return result | {"first": first, "reason": told[semconv.TRANSPORT_REASON]}


def theirs(model: Any, folder: str, backend: str, count: int, turn: Turn) -> dict[str, Any]:
    """The same to a stock server, through vLLM's own engine."""
    from vgen.testing import stock_server

    own = ["--weight-transfer-config", json.dumps({"backend": backend}), "--logprobs-mode", "processed_logprobs"]
    may = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    with stock_server(folder, arguments=[*ARGUMENTS, *own], environment=may, timeout=START_SECONDS) as url:
        turn.take()
        return ours(model, url, None, backend, count)


def measure(count: int, ways: list[str], turn: Turn) -> dict[str, Any]:
    import torch
    from weight_sync import floor, make

    from vgen import WeightSyncOptions
    from vgen.engines.server.launcher import start_server
    from vgen.testing import byte_tokenizer

    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ways": {}}
    result["devices"] = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        model = make("qwen2", "cuda")
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        model.config._name_or_path = folder
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        result["bytes"] = size

        def way(name: str, run: Callable[[], dict[str, Any]]) -> None:
            if name not in ways:
                return
            start = time.monotonic()
            try:
                result["ways"][name] = run()
            except Exception as error:
                result["ways"][name] = {"error": f"{type(error).__name__}: {error}"[-600:], "wrong": 1}
            result["ways"][name]["spent"] = time.monotonic() - start
            print(name, json.dumps(result["ways"][name]), file=sys.stderr, flush=True)

        two, own = torch.cuda.device_count() > 1, {"resident", "shared_memory", "nccl", "nccl_1g"} & set(ways)
        way("vllm_ipc", lambda: theirs(model, folder, "ipc", count, turn))
        ready = start_server(folder, arguments=ARGUMENTS, timeout=START_SECONDS) if own else nullcontext()
        with ready as server:
            if server is not None:
                turn.take()
            here = (server.url, server.control_key) if server is not None else ("", None)
            way("resident", lambda: ours(model, *here, "resident", count))
            way("shared_memory", lambda: ours(model, *here, "shared_memory", min(count, 3)))
            if two:
                torch.cuda.set_device(1)
                model.to("cuda:1")
                way("nccl", lambda: ours(model, *here, "nccl", count))
                way(
                    "nccl_1g",
                    lambda: ours(model, *here, "nccl", count, weight_sync=WeightSyncOptions(bucket_bytes=1 << 30)),
                )
        if two:
            torch.cuda.set_device(1)
            model.to("cuda:1")
            way("vllm_nccl", lambda: theirs(model, folder, "nccl", count, turn))
        result["floor_seconds"] = floor(size, "cuda")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", default="resident,shared_memory,nccl,nccl_1g,vllm_ipc,vllm_nccl")
    parser.add_argument("--turn", metavar="FILE", action="append", default=[], help=TURN)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    result = measure(asked.rounds, asked.ways.split(","), Turn(asked.turn))
    if asked.json:
        print(json.dumps(result))
    else:
        print(f"one contiguous copy: {result['floor_seconds'] * 1e3:.2f} ms\n")
        print("| | live, ms | whole sync, ms |\n|---|---:|---:|")
        for name, found in result["ways"].items():
            median = found.get("median", {})
            cells = (f"{median[key] * 1e3:.1f}" if key in median else "" for key in ("live", "sync"))
            print(f"| {name} | {' | '.join(cells)} | {found.get('error', '')}")
    return 1 if any(found["wrong"] for found in result["ways"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
