"""The cost of checking what callers pass to `generate` and `score`, beside its bound.

    python benchmarks/arguments.py            # a table
    python benchmarks/arguments.py --json     # one JSON object

The bound is 2 µs a prompt and 25 ns a token id. What is measured is everything between the caller and the engine's
requests that looks at arguments: the keywords, the options, each prompt's token ids, and the copies that vgen makes of
them. `score` includes what it makes of the result. Making a `Sampling` is measured by itself, because one serves many
calls.

Other processes may share the machine. So the clock is this process's own CPU time, and the figure is the minimum of
many rounds: what the work costs when nothing disturbs it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np  # as every trainer does, and then the checks use it

from vgen import Completion, Completions, Sampling
from vgen.arguments import checked_call
from vgen.generation.call_plan import CallRequest
from vgen.generation.prompts import Encoder
from vgen.generation.scoring import score
from vgen.testing import FakeEngine

PROMPT_US, TOKEN_US = 2.0, 0.025
LENGTHS, PROMPTS = (1, 64, 512, 4096), (1, 256)
ROUNDS, ROUND_SECONDS = 100, 0.004
VOCABULARY = 151_936


def fastest(call: Callable[[], object]) -> float:
    """The fewest microseconds of CPU time that a call took on average in any of the rounds."""
    gc.collect()
    gc.disable()
    start = time.process_time_ns()
    call()
    count = max(1, int(ROUND_SECONDS * 1e9 / max(1, time.process_time_ns() - start)))
    found = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time_ns()
        for _ in range(count):
            call()
        found = min(found, (time.process_time_ns() - start) / count / 1e3)
    gc.enable()
    return found


def checks(encoder: Encoder, no_images: Any, sampled: Completions) -> Callable[..., Any]:
    """What `Generation.generate` does with its arguments, and no more."""

    @checked_call
    def generate(
        prompts: Any,
        sampling: Any,
        num_generations: Any = 1,
        *,
        images: Any = None,
        lora_request: Any = None,
        priority: Any = 0,
        refused: Any = "raise",
        on_completion: Any = None,
    ) -> Any:
        request = CallRequest.of(prompts, sampling, num_generations, images, lora_request, priority, refused)
        encoder.encode(request.prompts, no_images)
        return sampled

    return generate


def measured() -> list[dict[str, Any]]:
    engine = FakeEngine(vocabulary_size=VOCABULARY, max_model_length=2 * max(LENGTHS) + 1)
    encoder, dice, sampling = Encoder(engine, None), random.Random(0), Sampling()
    rows: list[dict[str, Any]] = []

    def add(call: str, prompts: int, tokens: int, run: Callable[[], object]) -> None:
        bound = prompts * (PROMPT_US + tokens * TOKEN_US)
        rows.append({"call": call, "prompts": prompts, "token_ids": tokens, "us": fastest(run), "bound_us": bound})

    for prompts in PROMPTS:
        blank = [Completion(prompt_index=index, generation_index=0, token_ids=[0]) for index in range(prompts)]
        for length in LENGTHS:
            ids = [[dice.randrange(VOCABULARY) for _ in range(length)] for _ in range(prompts)]
            generate = checks(encoder, [()] * prompts, Completions(ids, blank, 1, "0"))
            add("generate", prompts, length, lambda ids=ids, call=generate: call(ids, sampling))
            halves = [each[: length // 2] for each in ids], [each[length // 2 :] for each in ids]
            add("score, whole", prompts, length, lambda ids=halves, call=generate: score(call, encoder, None, *ids, {}))
    return rows


def table(result: dict[str, Any]) -> str:
    lines = [f"{'call':14}{'prompts':>8}{'ids each':>10}{'µs':>12}{'bound':>12}{'of it':>8}"]
    for row in result["rows"]:
        figures = f"{row['us']:12.2f}{row['bound_us']:12.2f}{row['us'] / row['bound_us']:8.0%}"
        lines.append(f"{row['call']:14}{row['prompts']:8}{row['token_ids']:10}{figures}")
    lines.append(f"making a Sampling, once for all calls that use it: {result['sampling_us']:.2f} µs")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    as_json = parser.parse_args().json
    result = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "clock": f"process_time, the minimum of {ROUNDS} rounds",
        "sampling_us": fastest(lambda: Sampling(temperature=0.7, max_tokens=512, seed=3, stop="</s>")),
        "rows": measured(),
    }
    print(json.dumps(result, indent=1) if as_json else table(result))


if __name__ == "__main__":
    main()
