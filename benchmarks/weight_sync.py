"""The time to bring new weights into an engine in the same process, by vgen and by other ways.

    python benchmarks/weight_sync.py            # a table
    python benchmarks/weight_sync.py --json     # one JSON object

The models have random weights. On a CUDA device they are a Qwen2 of 1.54 B, a Llama of 8.0 B and a Qwen3-MoE of 3.3 B
parameters in bf16; on a CPU they are tiny, in float32. Each model runs in its own process. Every way brings fresh
random weights; device events measure it from before its first call to its last copy, and the table has medians.
`floor` is one contiguous device copy of the same bytes. After each way the engine's log-probabilities must equal the
trainer model's, in the prompt and in tokens decoded under CUDA graphs, or the exit code is 1. To show that this check
can fail, it is also made before the sync: with all weights stale, and with one stale layer.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

ROUNDS = {"trl": 3, "one_load": 5, "reload": 5}
FAST_ROUNDS = 15
TURN = "start beside other runs with this file, and be measured when none of them is; may be repeated"
MODELS = ("qwen2", "llama", "qwen3_moe")
COMMON = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False)
LARGE: dict[str, dict[str, Any]] = {
    "qwen2": dict(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llama": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "qwen3_moe": dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
    ),
}
TINY = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def make(kind: str, device: str) -> Any:
    """A trainer's model that was never saved."""
    import torch
    import transformers

    config, model = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }[kind]
    fields: dict[str, Any] = COMMON | {"max_position_embeddings": 2048, "architectures": [model.__name__]}
    fields |= LARGE[kind] if device == "cuda" else TINY
    if kind == "qwen3_moe" and device == "cpu":
        fields |= dict(head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made = model(config(**fields))
    finally:
        torch.set_default_dtype(before)
    randomize(made)
    return made.eval()


def randomize(model: Any, only: str = "") -> None:
    """Fresh random weights, of the whole model or of what has `only` in its name."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.03)


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds, on the device where there is one."""
    import torch

    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def floor(size: int, device: str) -> float:
    """Seconds of one contiguous copy of `size` bytes."""
    import torch

    value = torch.ones(size, dtype=torch.uint8, device=device)
    place = torch.empty_like(value)
    for _ in range(2):
        place.copy_(value)
    seconds = statistics.median(timed(partial(place.copy_, value), device) for _ in range(FAST_ROUNDS))
    del value, place
    if device == "cuda":
        torch.cuda.empty_cache()
    return seconds


class Turn:
    """Runs that are given the same files start side by side, and are measured one at a time, once all have started."""

    def __init__(self, files: list[str]) -> None:
        self._files = [open(file, "a") for file in files]  # noqa: SIM115 - until the process ends
        self._lock(fcntl.LOCK_SH)

    def take(self) -> None:
        """From here on, until this process ends, no other one is measured."""
        self._lock(fcntl.LOCK_UN)
        self._lock(fcntl.LOCK_EX)

    def _lock(self, how: int) -> None:
        for file in self._files:
            fcntl.flock(file, how)


class Case:
    """One model with an engine, and the ways of bringing weights from one to the other."""

    def __init__(self, kind: str, device: str) -> None:
        from vgen import ColocateGeneration, ProfilingContext
        from vgen.testing import MemorySink

        self.device, self.sink = device, MemorySink()
        self.model = make(kind, device)
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.model.parameters())
        engine: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 30 if device == "cuda" else 32 << 20}
        if device == "cuda":  # graphs, without the minutes of compilation
            engine["compilation_config"] = {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 2, 4],
            }
        self.generation = ColocateGeneration(
            self.model,
            max_model_length=1024,
            max_num_seqs=4,
            gpu_memory_utilization=0.35,
            enable_sleep_mode=True,
            profiling=ProfilingContext([self.sink]),
            engine_kwargs=engine,
        )
        self.engine = self.generation.engine
        self.source = self.generation.source

    def measure_floor(self) -> float:
        self.floor = floor(self.bytes, self.device)
        return self.floor

    def on_worker(self, function: Callable[[Any], Any]) -> Any:
        """Call it with the model runner."""

        def call(worker: Any) -> Any:
            from vllm.config import set_current_vllm_config

            with set_current_vllm_config(worker.vllm_config):
                return function(worker.model_runner)

        with self.engine._vllm_context():
            return self.engine.llm.collective_rpc(call)[0]

    def trl(self, runner: Any) -> None:
        """As TRL 1.16.0 does: one call for each parameter."""
        model = runner.get_model()
        for name, parameter in self.model.named_parameters():
            model.load_weights([(name, parameter.data)])

    def one_load(self, runner: Any) -> None:
        runner.get_model().load_weights(iter(self.source))

    def reload(self, runner: Any) -> None:
        """vLLM's own layerwise reload."""
        from vgen.weights.load.layerwise_reload import NamedStream, reload

        reload(runner, NamedStream(self.source))

    def compare(self) -> dict[str, Any]:
        """How far the engine is from the trainer's model, and whether that is right."""
        from vgen.weights.source.probe_forward import probe_logprobs
        from vgen.weights.verification.logprob_check import compare, probe_of, unit_of

        self.engine._reset_caches()
        expected = probe_logprobs(self.model, probe_of([self.engine], self.model), unit_of([self.engine]))
        return {**asdict(found := compare(self.engine, expected)), "right": found.right}


def measure(kind: str, device: str, turn: Turn) -> dict[str, Any]:
    """All figures of one model."""
    import torch

    from vgen.weights.load.batched_copy import copy_pairs, moves_of
    from vgen.weights.load.recorded_copy import RecordedCopy

    if device == "cpu":  # as on a GPU, parameters stay as they are loaded
        import vllm._custom_ops as ops

        ops._supports_onednn = False
    start = time.monotonic()
    case = Case(kind, device)
    result: dict[str, Any] = {"model": kind, "bytes": case.bytes, "start_seconds": round(time.monotonic() - start, 1)}
    turn.take()
    result |= {"floor_seconds": case.measure_floor(), "ways": {}, "checks": {}}

    case.generation.sync_weights()  # builds and proves the record
    first = case.sink.named("vgen.weight_sync")[-1]
    result["first_sync"] = {key: value for key, value in first.attributes.items() if "weight_sync" in key}
    result["first_sync"]["seconds"] = first.duration
    randomize(case.model, only="layers.1.mlp")
    result["checks"]["one_stale_layer"] = case.compare()
    randomize(case.model)
    result["checks"]["all_stale"] = case.compare()

    def way(name: str, run: Callable[[], Any], rounds: int = FAST_ROUNDS, **more: Any) -> None:
        seconds = []
        for index in range(rounds + 1):
            if index < 2:
                randomize(case.model)
            took = timed(run, device)
            seconds += [took] if index else []
        check = case.compare()
        median = statistics.median(seconds)
        own = {"seconds": median, "of_floor": median / case.floor, "best": min(seconds), "worst": max(seconds)}
        result["ways"][name] = own | check | more

    recorded = case.engine._weights
    for name in ("trl", "one_load", "reload"):
        function = getattr(case, name)
        if name != "reload" and recorded._record is None:
            result["ways"][name] = {"skipped": "the engine repacks weights after loading", "right": True}
            continue

        def run(runner: Any, name: str = name, function: Any = function) -> None:
            way(name, lambda: function(runner), ROUNDS[name])

        try:
            case.on_worker(run)
        except Exception as error:
            result["ways"][name] = {"error": f"{type(error).__name__}: {error}"[:200], "right": False}

    if recorded._record is not None:
        pairs = [
            (copy.place, copy.part.of(tensor))
            for source, tensor in case.source
            for copy in recorded._record.copies.get(source, ())
        ]
        moves, others = moves_of(pairs)
        result |= {"copies": len(pairs), "joined": len(moves), "converted": len(others)}
        way("foreach", lambda: copy_pairs(pairs))
        del pairs
        mine = RecordedCopy()
        mine._record, mine._decided = recorded._record, True

        def bring(runner: Any) -> None:
            for _ in range(2):
                mine.load(runner, case.source)
            way("recorded", lambda: mine.load(runner, case.source))
            result["ways"]["recorded"]["way"] = mine.way

        case.on_worker(bring)

    whole, returned = [], []
    for _ in range(FAST_ROUNDS):
        randomize(case.model)
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        case.generation.sync_weights()
        returned.append(time.perf_counter() - begin)
        if device == "cuda":
            torch.cuda.synchronize()
        whole.append(time.perf_counter() - begin)
    result["sync_weights_seconds"] = statistics.median(whole)  # with resets of caches, spans and all
    result["sync_weights_returned_seconds"] = statistics.median(returned)  # the device may still be copying
    result["sync_weights_way"] = recorded.way
    result["checks"]["sync_weights"] = case.compare()
    result["sleep"] = sleep(case, statistics.median(whole))
    case.generation.close()
    wrong = [name for name, found in result["ways"].items() if not found["right"]]
    wrong += [name for name in ("sync_weights",) if not result["checks"][name]["right"]]
    wrong += [name for name in ("all_stale",) if result["checks"][name]["right"]]
    wrong += [] if result["sleep"]["right"] else ["sleep"]
    return result | {"wrong": wrong}


def sleep(case: Case, sync: float) -> dict[str, Any]:
    """Waking after a level-2 sleep, and from there to the first token: with the weights brought back, by vLLM alone.

    `restore_seconds` is what the second part takes longer, as a part of a whole `sync_weights()` in `restore_of_sync`.
    """
    import torch

    from vgen import Sampling

    def alone(what: Callable[[Any], Any]) -> None:
        with case.engine._vllm_context():
            what(case.engine.llm)

    level = 2 if case.device == "cuda" else 0  # where vLLM's sleep discards nothing, and nothing is restored
    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "plain": (lambda: alone(lambda llm: llm.sleep(level=level)), lambda: alone(lambda llm: llm.wake_up())),
        "own": (lambda: case.generation.sleep(2), case.generation.wake_up),
    }
    times: dict[str, list[float]] = {f"{name}_{part}": [] for name in ways for part in ("wake", "to_token")}
    spans: list[float] = []
    for index in range(25):
        for first, (name, (fall, wake)) in enumerate(ways.items()):
            fall()
            randomize(case.model)
            if case.device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            wake()
            awake = time.perf_counter()
            case.generation.generate([[4 + index, 5 + first, 6]], Sampling(max_tokens=1))
            token = time.perf_counter()
            if index:  # the first one is slower
                times[f"{name}_wake"].append(awake - begin)
                times[f"{name}_to_token"].append(token - awake)
        if case.device == "cuda":
            spans += [case.sink.named("vgen.weight_sync")[-1].duration] if index else []
    if case.device == "cpu":
        case.generation.sync_weights()
    found: dict[str, Any] = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    restore = found["own_to_token_seconds"] - found["plain_to_token_seconds"]
    found |= {"restore_seconds": restore, "restore_of_sync": restore / sync, "all": times}
    found["restoring_sync_seconds"] = statistics.median(spans) if spans else None
    return found | case.compare()


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        if "error" in result:
            lines.append(f"\n{result['model']}: {result['error']}")
            continue
        size = result["bytes"] / 1e9
        floor_ms = result["floor_seconds"] * 1e3
        lines.append(f"\n{result['model']}, {size:.2f} GB; one contiguous copy {floor_ms:.2f} ms")
        lines.append(f"  {'way':20} {'ms':>9} {'x floor':>8}  {'mean |dlogp|':>12}  right")
        for name, found in result["ways"].items():
            if "seconds" not in found:
                lines.append(f"  {name:20} {found.get('error') or found['skipped']}")
                continue
            numbers = f"{found['seconds'] * 1e3:9.2f} {found['of_floor']:8.2f}  {found['mean']:12.2g}"
            lines.append(f"  {name:20} {numbers}  {found['right']}  {found.get('way', '')}")
        slept = {name: value for name, value in result["sleep"].items() if name != "all"}
        lines.append(f"  sync_weights() {result['sync_weights_seconds'] * 1e3:.2f} ms; sleep {slept}")
        lines.append(f"  first sync {result['first_sync']}; checks {result['checks']}")
        lines.append(f"  wrong: {result['wrong'] or 'nothing'}")
    return "\n".join(lines)


def finished(process: subprocess.Popen[str], timeout: float) -> dict[str, Any]:
    """What it has measured, or how it ended."""
    try:
        written, _ = process.communicate(timeout=timeout)
        return (
            json.loads(written.strip().splitlines()[-1])
            if process.returncode == 0
            else {"error": f"exit code {process.returncode}"}
        )
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return {"error": f"not done in {timeout:g} s"}
    except (ValueError, IndexError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated, of: %(default)s")
    parser.add_argument("--timeout", type=float, default=190.0, help="seconds for each model")
    parser.add_argument("--together", action="store_true", help="start the engines side by side, where all have room")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--turn", metavar="FILE", action="append", default=[], help=TURN)
    arguments = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.one:
        print("\n" + json.dumps(measure(arguments.one, device, Turn(arguments.turn))), flush=True)
        return 0
    results = []
    with tempfile.NamedTemporaryFile() as own:
        files = [*arguments.turn, *([own.name] if arguments.together else [])]
        more = [each for file in files for each in ("--turn", file)]
        running: dict[str, subprocess.Popen[str]] = {}
        for kind in (kinds := arguments.models.split(",")):
            for one in kinds if arguments.together else [kind]:
                if one not in running:
                    command = [sys.executable, __file__, "--one", one, *more]
                    running[one] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            results.append(finished(running[kind], arguments.timeout) | {"model": kind})
            if not arguments.json:
                print(table(results[-1:]), flush=True)
    if arguments.json:
        where = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        from importlib.metadata import version

        packages = {name: version(name) for name in ("torch", "transformers")}
        print(json.dumps({"device": where, "packages": packages, "models": results}, indent=1))
    return 1 if any("error" in result or result["wrong"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
