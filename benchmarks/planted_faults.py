"""What vgen's verification by log-probabilities sees, and what it does not: faults are planted, and counted.

    python benchmarks/planted_faults.py                       # a table; about fifteen minutes on two cores
    python benchmarks/planted_faults.py --json > result.json  # one JSON object
    python benchmarks/planted_faults.py --device cuda         # with fp8 too
    python benchmarks/planted_faults.py --from result.json    # the table of an earlier result

Each architecture and dtype runs in a process of its own, with vLLM in it. In each trial the model gets new random
weights and is synced. That is a right engine, which the verification must pass. Then a fault is planted in the
trainer's model, which the engine therefore does not have, and the verification must find it.

The suite measures noise and effect by itself, by root mean squares over the log-probabilities of the probe's tokens.
Noise: the trainer's forward pass in its dtype against the same in a wider one (float32 for 16 bits, float64 for
float32; for fp8 with the weights rounded to fp8 and back). Effect: the faulty trainer against the right one. A fault
counts if its effect is at least three times the noise. Faults are drawn until enough of them count, or until it is
clear that they do not. A cell of which fewer than 95 % are found reads "not detectable", and names what finds such a
fault instead. The exit code is 1 if fewer than 99 % of right engines pass.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RIGHT, COUNTING, DRAWN_AT_MOST = 300, 60, 4
"""Right trials of each dtype; faults of each kind and dtype that count; how many times as many are drawn at most."""
EFFECT = 3.0
CAUGHT, PASSED = 0.95, 0.99
ARCHITECTURES = ("llama", "qwen2", "gemma2", "opt", "qwen3_moe")
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "fp8")}
COVERED_BY = {
    "one layer stale": "bits",
    "head stale": "bits",
    "embedding stale": "bits",
    "experts swapped": "accounting, bits",
    "bias lost": "accounting",
    "matrix transposed": "accounting by shapes and strides, bits",
    "rope base changed": "the engine starts from the live configuration",
    "one norm stale": "bits",
    "weight scaled": "bits",
}
"""What finds the faults whose effect is lost in rounding."""
Plant = Callable[[Any, Any, random.Random], bool]


def matrices(layer: Any) -> list[Any]:
    return [parameter for parameter in layer.parameters() if parameter.dim() == 2]


def layers_of(model: Any) -> Any:
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return next(each for each in lists if len(each) == model.config.num_hidden_layers)


def renew(parameter: Any, dice: random.Random, share: float = 1.0) -> None:
    """Replace a share of the parameter by other values of its size."""
    import torch

    generator = torch.Generator(parameter.device).manual_seed(dice.randrange(1 << 30))
    noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
    value = parameter.float()
    size = value.std() if parameter.dim() > 1 else (value - value.mean()).abs().mean() + 1e-3
    parameter.copy_((1 - share**2) ** 0.5 * value + share * size * noise)


def layer_stale(model: Any, inner: Any, dice: random.Random) -> bool:
    for parameter in matrices(dice.choice(inner)):
        renew(parameter, dice)
    return True


def head_stale(model: Any, inner: Any, dice: random.Random) -> bool:
    renew(model.get_output_embeddings().weight, dice, dice.uniform(0.05, 1))
    return True


def embedding_stale(model: Any, inner: Any, dice: random.Random) -> bool:
    renew(model.get_input_embeddings().weight, dice, dice.uniform(0.05, 1))
    return True


def experts_swapped(model: Any, inner: Any, dice: random.Random) -> bool:
    experts = getattr(getattr(dice.choice(inner), "mlp", None), "experts", None)
    if experts is None:
        return False
    pair = dice.sample(range(len(experts.gate_up_proj)), 2)
    for weight in (experts.gate_up_proj, experts.down_proj):
        weight[pair] = weight[pair[::-1]].clone()
    return True


def bias_lost(model: Any, inner: Any, dice: random.Random) -> bool:
    layer = dice.choice(inner)
    biases = [p for name, p in layer.named_parameters() if name.endswith("bias") and "norm" not in name]
    # A bias of the keys adds the same to every score of a query, and changes nothing.
    biases = [p for p in biases if not any(p is q for n, q in layer.named_parameters() if "k_proj" in n)]
    if not biases:
        return False
    dice.choice(biases).zero_()
    return True


def matrix_transposed(model: Any, inner: Any, dice: random.Random) -> bool:
    square = [parameter for parameter in matrices(dice.choice(inner)) if parameter.shape[0] == parameter.shape[1]]
    if not square:
        return False
    chosen = dice.choice(square)
    chosen.copy_(chosen.t().clone())
    return True


def rope_changed(model: Any, inner: Any, dice: random.Random) -> bool:
    rotary = next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None:
        return False
    buffers = [(name, buffer) for name, buffer in rotary.named_buffers() if name.endswith("inv_freq")]
    base = dice.choice([2.0, 5.0, 10.0, 50.0])
    for _, buffer in buffers:
        size = len(buffer)
        buffer.mul_(base ** -(buffer.new_tensor(range(size)) / size))
    return bool(buffers)


def norm_stale(model: Any, inner: Any, dice: random.Random) -> bool:
    norms = [
        p for name, p in dice.choice(inner).named_parameters() if p.dim() == 1 and "norm" in name and "bias" not in name
    ]
    renew(dice.choice(norms), dice, dice.uniform(0.1, 1))
    return True


def weight_scaled(model: Any, inner: Any, dice: random.Random) -> bool:
    dice.choice(matrices(dice.choice(inner))).mul_(1 + math.exp(dice.uniform(math.log(0.02), math.log(0.5))))
    return True


FAULTS: dict[str, Plant] = {
    "one layer stale": layer_stale,
    "head stale": head_stale,
    "embedding stale": embedding_stale,
    "experts swapped": experts_swapped,
    "bias lost": bias_lost,
    "matrix transposed": matrix_transposed,
    "rope base changed": rope_changed,
    "one norm stale": norm_stale,
    "weight scaled": weight_scaled,
}


def rms(values: Any) -> float:
    return float(values.pow(2).mean().sqrt())


def measure(architecture: str, dtype: str, device: str, scale: float) -> dict[str, Any]:
    """All trials of one architecture in one dtype: right ones and how many passed; faults drawn, counting, found."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    import torch

    from vgen import ColocateGeneration
    from vgen.checks import Oracle, Sampled, tiny_model
    from vgen.checks.training import randomize
    from vgen.weights.source.probe_forward import probe_logprobs
    from vgen.weights.verification.logprob_check import compare, probe_of, unit_of

    fp8 = dtype == "fp8"
    torch_dtype = torch.bfloat16 if fp8 else getattr(torch, dtype)
    fields: dict[str, Any] = {} if architecture in ("opt", "gemma2") else {"tie_word_embeddings": False}
    model: Any = tiny_model(architecture, **fields).to(device=device, dtype=torch_dtype)
    engine_kwargs: dict[str, Any] = (
        {"kv_cache_memory_bytes": 1 << 30, "enforce_eager": True} if device == "cuda" else {}
    )
    engine_kwargs |= {"quantization": "fp8"} if fp8 else {}
    options: dict[str, Any] = dict(max_model_length=384, max_num_seqs=4, gpu_memory_utilization=0.1)
    generation = ColocateGeneration(model, **options, engine_kwargs=engine_kwargs)
    engine = generation.engine
    generation.sync_weights(verify="none")
    token_ids = probe_of([engine], model)
    oracle, probe = Oracle(model, fp8=fp8), [Sampled(token_ids[1:], [0.0] * (len(token_ids) - 1))]
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dice = random.Random(f"{architecture} {dtype}")

    def right() -> bool:
        return compare(engine, probe_logprobs(model, token_ids, unit_of([engine]))).right

    applicable = [name for name, plant in FAULTS.items() if _can(plant, model)]
    wanted = {name: math.ceil(scale * COUNTING / _sharing(name)) for name in applicable}
    trials = math.ceil(scale * RIGHT / len(ARCHITECTURES))
    result: dict[str, Any] = {"right": [0, 0], "faults": {name: [0, 0, 0] for name in applicable}}
    seed = 0
    while result["right"][0] < trials or any(_open(result["faults"][name], wanted[name]) for name in applicable):
        seed += 1
        model.load_state_dict(base)  # `randomize` adds to vectors, which would drift away
        randomize(model, seed)
        generation.sync_weights(verify="none")
        if result["right"][0] < trials:
            result["right"][0] += 1
            result["right"][1] += right()
        trainer, rounding, _ = oracle.logprobs([token_ids[:1]], probe)
        noise = rms(rounding) + 2.0**-21 * float(trainer.abs().mean())
        kept = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        for name in applicable:
            found = result["faults"][name]
            if not _open(found, wanted[name]):
                continue
            with torch.no_grad():
                FAULTS[name](model, layers_of(model), dice)
            found[0] += 1
            if rms(oracle.logprobs([token_ids[:1]], probe)[0] - trainer) >= EFFECT * noise:
                found[1] += 1
                found[2] += not right()
            with torch.no_grad():
                for place, tensor in [*model.named_parameters(), *model.named_buffers()]:
                    tensor.copy_(kept[place])
    generation.close()
    return result


def _can(plant: Plant, model: Any) -> bool:
    """Whether the architecture has what the fault is planted in; the model is put back."""
    import torch

    kept = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    with torch.no_grad():
        possible = any(plant(model, layers_of(model), random.Random(seed)) for seed in range(4))
        for place, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(kept[place])
    return possible


def _sharing(fault: str) -> int:
    """How many architectures share the trials of a fault."""
    return {"experts swapped": 1, "bias lost": 2, "rope base changed": 4}.get(fault, len(ARCHITECTURES))


def _open(found: list[int], wanted: int) -> bool:
    return found[1] < wanted and found[0] < DRAWN_AT_MOST * wanted


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a rate (E. B. Wilson, 1927)."""
    if not trials:
        return 0.0, 1.0
    rate, square = successes / trials, z * z
    middle = (rate + square / (2 * trials)) / (1 + square / trials)
    reach = z / (1 + square / trials) * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def totals(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By dtype: the right trials, and of each fault those drawn, counting and caught, over all architectures."""
    found: dict[str, dict[str, Any]] = {}
    for case in result["cases"]:
        of = found.setdefault(case["dtype"], {"right": [0, 0], "faults": {}})
        of["right"] = [a + b for a, b in zip(of["right"], case["right"], strict=True)]
        for name, counts in case["faults"].items():
            of["faults"][name] = [a + b for a, b in zip(of["faults"].get(name, [0, 0, 0]), counts, strict=True)]
    return found


def verdict(drawn: int, counting: int, caught: int, needed: int) -> str:
    """The rate of those that count with its interval; below the aim, or with too few to say, it is not detectable."""
    if not counting:
        return f"*not detectable*: none of {drawn} counts"
    low, high = wilson(caught, counting)
    rate = f"{caught} of {counting} of {drawn}: {100 * caught / counting:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
    return rate if counting >= needed and caught >= CAUGHT * counting else f"*not detectable*: {rate}"


def table(result: dict[str, Any]) -> str:
    """Markdown: for each fault and dtype how many were found, of how many that count, of how many that were drawn."""
    needed, by_dtype = math.ceil(COUNTING * result["scale"]), totals(result)
    passed = " | ".join(_passed(*found["right"]) for found in by_dtype.values())
    lines = [
        f"| fault | {' | '.join(by_dtype)} | what finds it besides |",
        f"|---|{'---|' * len(by_dtype)}---|",
        f"| *none: right engines that pass* | {passed} | |",
    ]
    for name in FAULTS:
        counts = [found["faults"].get(name) for found in by_dtype.values()]
        cells = ["" if each is None else verdict(*each, needed) for each in counts]
        lines.append(f"| {name} | {' | '.join(cells)} | {COVERED_BY[name]} |")
    return "\n".join(lines)


def _passed(trials: int, passed: int) -> str:
    low, high = wilson(passed, trials)
    return f"{passed} of {trials}: {100 * passed / trials:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def short(result: dict[str, Any]) -> list[str]:
    """The dtypes in which fewer right engines pass than must."""
    right = {dtype: found["right"] for dtype, found in totals(result).items()}
    return [
        f"{d}: only {passed} of {trials} right engines pass"
        for d, (trials, passed) in right.items()
        if passed < PASSED * trials
    ]


def in_a_process(*case: Any) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", choices=sorted(DTYPES), default="cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of trials, for a quick look")
    parser.add_argument("--only", action="append", help="of the architectures; may be given several times")
    parser.add_argument("--dtype", action="append", help="of those of the device; may be given several times")
    parser.add_argument("--from", dest="earlier", nargs="+", help="show these results as one, and measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return 0
    if options.earlier:
        results = [json.loads(Path(path).read_text()) for path in options.earlier]
        result = results[0] | {"cases": [case for each in results for case in each["cases"]]}
    else:
        from importlib.metadata import version

        cases = [
            {"architecture": name, "dtype": dtype} | in_a_process(name, dtype, options.device, options.scale)
            for dtype in options.dtype or DTYPES[options.device]
            for name in options.only or ARCHITECTURES
        ]
        versions = {name: version(name) for name in ("torch", "transformers")}
        result = {
            "device": options.device,
            "cpu": platform.processor(),
            "scale": options.scale,
            **versions,
            "cases": cases,
        }
    print(json.dumps(result) if options.json else table(result))
    for problem in short(result):
        print(problem, file=sys.stderr)
    return 1 if short(result) else 0


if __name__ == "__main__":
    sys.exit(main())
