"""W&B's service frozen or killed while training goes on: the loop does not notice, and closing keeps its deadline.

Each case runs in a process of its own, because W&B's client cannot be relied on after that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow

STEPS = 60
DEADLINE = 2.0
PATIENCE = 10.0
"""Seconds that a busy machine may take for what is done in a moment. A blocked call of W&B's takes longer."""


def run_child(fault: str, directory: Path) -> tuple[dict[str, Any], str]:
    with subprocess.Popen(
        [sys.executable, __file__, fault, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        # a service of its own, not the one that these tests already have
        env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
    ) as process:
        try:
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    return json.loads(out.splitlines()[-1]), errors


@pytest.mark.parametrize("fault", ["SIGSTOP", "SIGKILL"])
@pytest.mark.fault(
    point="W&B, MLflow and Trackio",
    did="W&B's service is stopped or killed",
    happens="The loop goes on; `close` keeps its deadline; losses are counted",
    within=60,
)
def test_the_loop_goes_on_and_close_keeps_its_deadline(fault: str, tmp_path: Path) -> None:
    found, errors = run_child(fault, tmp_path)
    assert abs(found["faulty"]["operations"] - found["healthy"]["operations"]) < STEPS
    assert found["faulty"]["seconds"] < PATIENCE
    assert found["close"] < DEADLINE + PATIENCE
    # What W&B had before the fault is no loss; everything after it is, and it is counted.
    assert found["lost"] == {"WandbSink": STEPS}
    assert "WandbSink" in errors


def test_a_service_that_was_frozen_for_a_while_gets_everything(tmp_path: Path) -> None:
    found, errors = run_child("SIGCONT", tmp_path)
    assert found["lost"] == {}
    assert errors == ""
    assert sum(row.get("vgen/steps", 0) for row in found["rows"]) == 3 * STEPS
    assert sum(row.get("vgen/train.step.duration.count", 0) for row in found["rows"]) == 3 * STEPS


def child(fault: str, directory: Path) -> None:
    from helpers import wandb_runs
    from helpers.operations import calls_made

    from vgen.profiling import ProfilingContext, semconv
    from vgen.profiling.sinks.wandb import WandbSink

    run = wandb_runs.start(directory)
    service = next(p for p in psutil.Process().children(recursive=True) if p.name().startswith("wandb-core"))
    profiling = ProfilingContext([WandbSink(run, detail=True)])

    def steps() -> None:
        for n in range(STEPS):
            with profiling.step(n), profiling.span("work"):
                profiling.record_many(semconv.REQUEST_E2E, [0.1, 0.2])

    def train() -> dict[str, float]:
        started = time.monotonic()
        return {"operations": calls_made(steps), "seconds": time.monotonic() - started}

    train()  # everything imported and allocated
    healthy = train()
    profiling.flush()
    service.send_signal(signal.SIGKILL if fault == "SIGKILL" else signal.SIGSTOP)
    faulty = train()
    if fault == "SIGCONT":
        service.send_signal(signal.SIGCONT)
    started = time.monotonic()
    profiling.close(DEADLINE)
    close = time.monotonic() - started
    lost = profiling.dropped()
    result: dict[str, Any] = {"healthy": healthy, "faulty": faulty, "close": close, "lost": lost}
    if fault == "SIGCONT":
        run.finish()
        result["rows"] = wandb_runs.rows(run)
    print(json.dumps(result), flush=True)
    service.kill()
    os._exit(0)  # W&B's own exit hook would wait for its service


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
