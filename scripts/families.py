"""Weight syncs of tiny models of many architectures on the real engine, judged by the trainer's own forward pass.

    PYTHONPATH=src:tests python scripts/families.py --parallel 6 --out families.json [NAME ...]

Each runs in a process of its own. With CUDA the list has other dtypes and quantization too, and a draft model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers.families import FAMILIES

HELPERS = Path(__file__).parents[1] / "tests" / "helpers"
HARD = (
    *(
        "llama",
        "bloom",
        "gemma2",
        "gemma3",
        "phi3",
        "opt",
        "mixtral",
        "qwen3_moe",
        "glm4_moe",
        "deepseek_v2",
        "deepseek_v3",
    ),
    *("gpt_oss", "qwen3_next", "lfm2", "jamba", "mamba2", "falcon_h1", "granitemoehybrid"),
)
ON_CUDA = [
    *((name, "bfloat16", {}) for name in HARD),
    ("qwen3_moe", "float32", {}),
    ("llama", "float32", {}),
    ("llama", "bfloat16", {"quantization": "fp8"}),
    ("qwen3_moe", "bfloat16", {"quantization": "fp8"}),
    ("deepseek_v2", "bfloat16", {"enforce_eager": True}),
]
ON_CPU = [(name, "float32", {}) for name in FAMILIES]


def run(command: list[str], seconds: float) -> dict:
    """The result that a worker prints; an error if it prints none in time."""
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"command": command[1:], "error": f"no result in {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"command": command[1:], "error": f"ended with {done.returncode}", "trace": done.stderr[-1500:]}
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of architectures; by default all")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240.0, help="for each")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    import torch

    cuda = torch.cuda.is_available()
    cases = ON_CUDA if cuda else ON_CPU
    cases = [case for case in cases if not options.names or case[0] in options.names]
    commands = [[str(HELPERS / "family_worker.py"), name, dtype, json.dumps(kwargs)] for name, dtype, kwargs in cases]
    if cuda and (not options.names or "draft" in options.names):
        commands.insert(0, [str(HELPERS / "draft_worker.py")])
    results: list[dict] = []
    with ThreadPoolExecutor(options.parallel) as pool:
        for result in pool.map(lambda command: run(command, options.seconds), commands):
            results.append(result)
            options.out.write_text(json.dumps(results, indent=1))
            shown = {key: value for key, value in result.items() if key != "trace"}
            print(json.dumps(shown)[:600], flush=True)


if __name__ == "__main__":
    main()
