"""Syncs of one architecture on the real engine, judged by the trainer's own forward: `family_worker.py NAME DTYPE`."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch

from helpers.families import family, refresh
from vgen import ColocateGeneration, Sampling

PROMPT = [5, 9, 33, 120, 77, 100, 101, 3] + [(i * 37 + 11) % 250 for i in range(40)]


def difference(generation: Any, model: Any) -> float:
    """The largest difference, in nats, of the log-probabilities of prompt and completion."""
    sampling = Sampling(max_tokens=6, temperature=1.0, seed=3, prompt_logprobs=0, ignore_eos=True)
    (completion,) = generation.generate([PROMPT], sampling)
    ours = torch.tensor(completion.prompt_logprobs[1:] + completion.logprobs)
    ids = torch.tensor([PROMPT + completion.token_ids], device=model.device)
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return float((logprobs[:-1].gather(-1, ids[0, 1:, None])[:, 0].cpu() - ours).abs().max())


def run(name: str, dtype: str, **engine_kwargs: Any) -> dict[str, Any]:
    """Three syncs of other weights; with CUDA, whose decoding runs in graphs, also syncs and wakes after sleeping."""
    result: dict[str, Any] = {"name": name, "dtype": dtype, "engine": engine_kwargs, "syncs": [], "asleep": []}
    cuda = torch.cuda.is_available()
    try:
        model = family(name, getattr(torch, dtype)).to("cuda" if cuda else "cpu")
        kwargs = ({"kv_cache_memory_bytes": 1 << 30} if cuda else {}) | engine_kwargs
        options = dict(max_model_length=128, max_num_seqs=4, enable_sleep_mode=cuda, engine_kwargs=kwargs)
        options["gpu_memory_utilization"] = 0.05  # of a device that others use too
        with ColocateGeneration(model, **options) as generation:
            for step in range(3):
                refresh(model, step + 1)
                generation.sync_weights(version=str(step))
                result["syncs"].append(difference(generation, model))
            report = generation.verify()
            result["ratios"] = [[each.ratio, each.decoded_ratio] for each in report.engines]
            for level in (2, 1, 2) if cuda else ():
                generation.sleep(level=level)
                if level == 2:
                    refresh(model, level + 7)
                    generation.wake_up(["weights"])
                    generation.sync_weights(version=f"level {level}")
                    generation.wake_up(["kv_cache"])
                else:
                    generation.wake_up()
                result["asleep"].append(difference(generation, model))
            weights = generation.engine._weights
            result |= {"recorded": weights.recorded, "reason": weights.reason, "unaudited": weights.audit.skipped}
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        result["trace"] = traceback.format_exc()[-3000:]
    return result


if __name__ == "__main__":
    print("RESULT " + json.dumps(run(sys.argv[1], sys.argv[2], **json.loads((sys.argv[3:] or ["{}"])[0]))), flush=True)
