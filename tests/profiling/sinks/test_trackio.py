"""The Trackio sink in a real run, read back from its database.

The run lives in a process of its own: where Trackio writes is settled when it is first imported.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from typing import Any

import pytest

STEPS = 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trackio")
    found = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    with sqlite3.connect(folder / "tests.db") as database:
        return [(step, json.loads(row)) for step, row in database.execute("SELECT step, metrics FROM metrics")]


def test_each_step_is_a_row_at_the_trainers_number(rows: list[tuple[int, dict[str, Any]]]) -> None:
    mine = [(step, row) for step, row in rows if "vgen.generate.output_tokens" in row]
    assert [(step, row["vgen.generate.output_tokens"]) for step, row in mine] == [(n, 10 + n) for n in range(STEPS)]
    assert all(row["vgen.request.e2e.count"] == 2 and row["train.step.duration.count"] == 1 for _, row in mine)


def test_no_row_of_the_trainers_is_lost(rows: list[tuple[int, dict[str, Any]]]) -> None:
    assert [(step, row["loss"]) for step, row in rows if "loss" in row] == [(n, n + 0.5) for n in range(STEPS)]
    assert [row["reward"] for _, row in rows if "reward" in row] == [n + 0.25 for n in range(STEPS)]


def test_nan_and_infinity_are_taken(rows: list[tuple[int, dict[str, Any]]]) -> None:
    [row] = [row for _, row in rows if "nan" in row]
    assert (math.isnan(float(row["nan"])), float(row["infinite"])) == (True, math.inf)


def child() -> None:
    import trackio

    from vgen.profiling import Instrument, ProfilingContext, semconv
    from vgen.profiling.sinks.trackio import TrackioSink

    run = trackio.init(project="tests", auto_log_cpu=False, auto_log_gpu=False)
    profiling = ProfilingContext([TrackioSink(run)])
    for n in range(STEPS):
        with profiling.step(n):
            profiling.record(semconv.GENERATED_TOKENS, 10 + n)
            profiling.record_many(semconv.REQUEST_E2E, [0.5, 1.5])
            if n == 2:
                profiling.record(Instrument("nan", "gauge"), math.nan)
                profiling.record(Instrument("infinite", "gauge"), math.inf)
            run.log({"loss": n + 0.5}, step=n)
        run.log({"reward": n + 0.25})
        profiling.flush()
    assert profiling.close()
    assert profiling.dropped() == {}
    run.finish()


if __name__ == "__main__":
    child()
