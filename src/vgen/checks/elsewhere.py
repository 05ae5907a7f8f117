"""Cases in a process of their own: for another architecture, or an engine that must be the only one of its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import CheckError
from .session import Bench, Case, WrongWeights

ELSEWHERE = "VGEN_CHECK_ELSEWHERE"
"""The environment variable that such a process has."""
SECONDS = 240.0
"""For all the cases of one such process."""


def own_engine(case: Case) -> Case:
    """The same case, for one whose engine sleeps and is not the session's.

    vLLM keeps the device memory of engines that sleep in one pool for each process, and lets one engine have it, ever.
    So on a CUDA device the case runs in another process, where the session makes no engine.
    """

    def run(bench: Bench) -> None:
        if "CUDA" in bench.session.abilities and ELSEWHERE not in os.environ:
            dtype = str(next(bench.model.parameters()).dtype).removeprefix("torch.")
            run_elsewhere(bench, bench.model.config.model_type, dtype, (case.name,))
        else:
            case.run(bench)

    return replace(case, run=run, own_engine=True)


def run_elsewhere(bench: Bench, model: str, dtype: str, cases: Sequence[str]) -> None:
    """Run cases on a tiny model of that architecture in another process, and judge by their outcomes."""
    # Less than the case itself has, so that the other process ends with it.
    outcomes = check_elsewhere(model, dtype, cases, min(SECONDS, 0.9 * bench.session.timeout))
    ratios = [outcome["measurement"]["ratio"] for outcome in outcomes if outcome["measurement"]]
    for outcome in outcomes:
        if outcome["status"] == "wrong":
            raise WrongWeights(f"{outcome['case']}: {outcome['detail']}")
        if outcome["status"] not in ("right", "skipped"):
            raise CheckError(f"{model}: {outcome['case']}: {outcome['status']}: {outcome['detail']}")
    notes = [outcome["detail"] for outcome in outcomes if outcome["detail"]] if len(outcomes) == 1 else []
    bench.note = "; ".join([f"{len(ratios)} cases, at most {max(ratios, default=0.0):.2g} times the noise", *notes])


def check_elsewhere(model: str, dtype: str, cases: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """Run cases on another architecture in a process of its own; returns their outcomes as JSON has them.

    vLLM cannot start every kind of model in a process that had another kind. Raises `CheckError`.
    """
    command = [sys.executable, "-m", "vgen.cli", "check", model, "--dtype", dtype, "--json"]
    command += [word for case in cases for word in ("--case", case)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=os.environ | {ELSEWHERE: "1"}
        )
    except subprocess.TimeoutExpired as error:
        raise CheckError(f"vgen check {model} did not end within {seconds:g} s") from error
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise CheckError(f"vgen check {model} ended with {done.returncode} and said {said[0]}") from error
    if result["error"]:
        raise CheckError(result["error"])
    return result["cases"]
