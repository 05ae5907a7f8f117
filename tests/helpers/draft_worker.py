"""A draft model over level-2 sleeps, on a GPU: which share of its tokens the target accepts."""

from __future__ import annotations

import json
import tempfile
import traceback
from typing import Any

import transformers

from helpers.families import family
from helpers.family_worker import PROMPT
from vgen import ColocateGeneration, Sampling

CYCLES = 10


def drafted_and_accepted(generation: Any) -> tuple[float, float]:
    counters = {metric.name: metric.value for metric in generation.engine.llm.get_metrics() if hasattr(metric, "value")}
    return counters["vllm:spec_decode_num_draft_tokens"], counters["vllm:spec_decode_num_accepted_tokens"]


def acceptance(generation: Any) -> float:
    """Of greedy completions of several prompts."""
    before = drafted_and_accepted(generation)
    prompts = [PROMPT[start:] for start in range(4)]
    generation.generate(prompts, Sampling(max_tokens=60, temperature=0.0, logprobs=None, ignore_eos=True))
    after = drafted_and_accepted(generation)
    return (after[1] - before[1]) / (after[0] - before[0])


def run() -> dict[str, Any]:
    result: dict[str, Any] = {"acceptance": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            family("llama").bfloat16().save_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder).cuda().eval()
            draft = {"method": "draft_model", "model": folder, "num_speculative_tokens": 3, "max_model_len": 128}
            kwargs = {"kv_cache_memory_bytes": 1 << 30, "speculative_config": draft, "disable_log_stats": False}
            options = dict(max_model_length=128, max_num_seqs=4, enable_sleep_mode=True, engine_kwargs=kwargs)
            with ColocateGeneration(model, **options) as generation:
                generation.sync_weights(version="0")
                result["acceptance"].append(acceptance(generation))
                for cycle in range(CYCLES):
                    generation.sleep(level=2)
                    generation.wake_up(["weights"])
                    generation.sync_weights(version=str(cycle + 1))
                    generation.wake_up(["kv_cache"])
                    result["acceptance"].append(acceptance(generation))
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        result["trace"] = traceback.format_exc()[-3000:]
    return result


if __name__ == "__main__":
    print("RESULT " + json.dumps(run()), flush=True)
