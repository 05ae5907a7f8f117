"""How well a verification by log-probabilities tells wrong weights from right ones.

    python benchmarks/verification_power.py                     # a table
    python benchmarks/verification_power.py --json              # one JSON object
    python benchmarks/verification_power.py --device cuda       # larger models, fp8 engines and CUDA graphs
    python benchmarks/verification_power.py --from result.json  # the table of an earlier result

Each model runs in a process of its own, with vLLM in it. The weights are those of a fresh model (standard deviation
0.02), or as if trained (larger, norms and biases away from their first values). They are synced, and the engine is
compared: that is a right engine. Then a fault is planted in the trainer's model, which the engine therefore does not
have, and it is compared again. The figures are multiples of the rounding noise. The exit code is 1 if a right engine is
beyond the bound, or a planted fault is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SEEDS = 3
SETTINGS = ("fresh", "trained")
CASES: dict[str, list[tuple[str, str, str | None]]] = {
    "cpu": [
        (model, dtype, None) for model in ("llama", "qwen2", "deep", "qwen3_moe") for dtype in ("float32", "bfloat16")
    ],
    "cuda": [
        *((model, dtype, None) for model in ("llama", "qwen3_moe") for dtype in ("float32", "float16", "bfloat16")),
        *((model, "bfloat16", None) for model in ("llama_1b", "llama_8b", "qwen3_moe_3b")),
        *((model, "bfloat16", "fp8") for model in ("llama", "qwen3_moe", "llama_1b")),
    ],
}
"""Model, dtype of both sides, and the engine's quantization."""


def config(model: str) -> Any:
    import transformers

    sizes = dict(vocab_size=272, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=256)
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32)
    match model:
        case "deep":
            sizes |= dict(hidden_size=256, num_hidden_layers=8)
        case "llama_1b":
            sizes |= dict(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
            sizes |= dict(num_attention_heads=32, num_key_value_heads=8)
        case "llama_8b":
            sizes |= dict(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32)
            sizes |= dict(num_attention_heads=32, num_key_value_heads=8)
        case "qwen3_moe_3b":
            sizes |= dict(vocab_size=151_936, hidden_size=2048, num_hidden_layers=8, num_attention_heads=32)
            experts = dict(num_experts=64, num_experts_per_tok=8, moe_intermediate_size=768, head_dim=128)
        case _:
            pass
    if model.startswith("qwen3_moe"):
        return transformers.Qwen3MoeConfig(**sizes, **experts, tie_word_embeddings=False)
    kind = transformers.Qwen2Config if model == "qwen2" else transformers.LlamaConfig
    return kind(**sizes, tie_word_embeddings=False)


def fill(model: Any, setting: str, seed: int) -> None:
    """Fresh weights, or weights as if trained."""
    import torch

    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            vector, norm = parameter.dim() == 1, "norm" in name
            if setting == "fresh":
                parameter.copy_(torch.full_like(noise, float(norm)) if vector else 0.02 * noise)
            else:
                parameter.copy_(0.2 * noise + norm if vector else noise * (0.6 / parameter.shape[-1] ** 0.5))


def faults(model: Any, setting: str, token_ids: list[int]) -> dict[str, Callable[[], object]]:
    """What is done to the trainer's model, so that the engine lacks it."""
    layer = model.model.layers[len(model.model.layers) // 2]

    def renew(*parameters: Any) -> None:
        for number, parameter in enumerate(parameters):
            import torch

            generator = torch.Generator(parameter.device).manual_seed(1000 + number)
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.copy_(noise * parameter.float().std())

    def swap_experts() -> None:
        """Swap the two experts that the probe's tokens meet most."""
        import torch

        chosen: list[torch.Tensor] = []
        handle = layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[-1]))
        model(torch.tensor([token_ids], device=model.device))
        handle.remove()
        swapped = torch.bincount(chosen[0].flatten()).topk(2).indices
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight[swapped] = weight[swapped.flip(0)].clone()

    planted: dict[str, Callable[[], object]] = {
        "all weights stale": lambda: fill(model, setting, 99),
        "one layer stale": lambda: renew(*(weight for weight in layer.parameters() if weight.dim() > 1)),
        "head stale": lambda: renew(model.lm_head.weight),
        "one norm 10 % off": lambda: layer.input_layernorm.weight.mul_(1.1),
    }
    if setting == "trained" and model.config.model_type == "qwen2":  # fresh biases are zero
        planted["bias lost"] = lambda: layer.self_attn.v_proj.bias.zero_()
    if model.config.model_type == "qwen3_moe":
        planted["two experts swapped"] = swap_experts
        planted["router stale"] = lambda: renew(layer.mlp.gate.weight)
    return planted


@contextmanager
def other_rope(model: Any) -> Iterator[None]:
    """Within the block the rotary embedding has a base of 100."""
    rotary = model.model.rotary_emb
    original = rotary.inv_freq.clone()
    size = len(original)
    rotary.inv_freq.copy_(100.0 ** (-original.new_tensor(range(size)) / size))
    yield
    rotary.inv_freq.copy_(original)


def measure(name: str, dtype: str, quantization: str | None, device: str) -> dict[str, Any]:
    """All ratios of one model, for both settings: right engines and each fault."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    import transformers

    from vgen import ColocateGeneration
    from vgen.weights.source.probe_forward import probe_logprobs
    from vgen.weights.verification.logprob_check import compare, probe_of, unit_of

    with torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(name), dtype=getattr(torch, dtype)).eval()
    engine_kwargs: dict[str, Any] = {} if quantization is None else {"quantization": quantization}
    if device == "cuda":
        engine_kwargs["kv_cache_memory_bytes"] = 1 << 30
    generation = ColocateGeneration(model, max_model_length=512, max_num_seqs=4, engine_kwargs=engine_kwargs)
    engine = generation.engine

    def ratios() -> dict[str, float]:
        expected = probe_logprobs(model, probe_of([engine], model), unit_of([engine]))
        found = compare(engine, expected)
        figures = {"ratio": found.ratio, "decoded": found.decoded_ratio, "mean": found.mean, "largest": found.largest}
        return {key: float(f"{value:.4g}") for key, value in figures.items()}

    results: dict[str, dict[str, list[dict[str, float]]]] = {setting: {} for setting in SETTINGS}
    for setting in SETTINGS:
        for seed in range(SEEDS):
            fill(model, setting, seed)
            generation.sync_weights(verify="none")

            def note(case: str, setting: str = setting) -> None:
                results[setting].setdefault(case, []).append(ratios())

            note("right")
            with other_rope(model):
                note("other rope base")
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            with torch.no_grad():
                for case, plant in faults(model, setting, probe_of([engine], model)).items():
                    plant()
                    note(case)
                    model.load_state_dict(weights)
    generation.close()
    return results


def in_a_process(*case: str | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """Markdown: the largest ratio of right engines, and the smallest one of each fault."""
    faults = dict.fromkeys(fault for case in result["cases"] for found in case["ratios"].values() for fault in found)
    lines = [
        f"| model | weights | {' | '.join(faults)} | right: decoded |",
        "|---|---|" + "---:|" * (len(faults) + 1),
    ]
    for case in result["cases"]:
        label = " ".join(filter(None, (case["model"], case["dtype"], case["quantization"])))
        for setting, found in case["ratios"].items():
            worst = [
                f"{(max if fault == 'right' else min)(each['ratio'] for each in found[fault]):.3g}"
                if fault in found
                else ""
                for fault in faults
            ]
            decoded = max(each["decoded"] for each in found["right"])
            lines.append(f"| {label} | {setting} | {' | '.join(worst)} | {decoded:.2g} |")
    return "\n".join(lines)


def wrong(result: dict[str, Any]) -> list[str]:
    """Right engines beyond the bound, and faults within it."""
    return [
        f"{case['model']} {case['dtype']} {case['quantization'] or ''} {setting}: {fault}: {each}"
        for case in result["cases"]
        for setting, found in case["ratios"].items()
        for fault, all_of_them in found.items()
        for each in all_of_them
        if (max(each["ratio"], each["decoded"]) <= result["bound"]) != (fault == "right")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    parser.add_argument("--models", help="only these, separated by commas")
    parser.add_argument("--from", dest="earlier")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return 0
    if options.earlier:
        with open(options.earlier) as file:
            result = json.load(file)
    else:
        from importlib.metadata import version

        from vgen.weights.verification.logprob_check import BOUND

        cases = [
            {"model": model, "dtype": dtype, "quantization": quantization}
            | {"ratios": in_a_process(model, dtype, quantization, options.device)}
            for model, dtype, quantization in CASES[options.device]
            if not options.models or model in options.models.split(",")
        ]
        versions = {name: version(name) for name in ("torch", "transformers")}
        result = {"bound": BOUND, "device": options.device, "cpu": platform.processor(), **versions, "cases": cases}
    print(json.dumps(result) if options.json else table(result))
    for problem in wrong(result):
        print(problem, file=sys.stderr)
    return 1 if wrong(result) else 0


if __name__ == "__main__":
    sys.exit(main())
