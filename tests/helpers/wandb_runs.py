"""Real offline W&B runs, read with W&B's own tool; and a run in memory that follows the same rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start(directory: Path, **settings: Any) -> Any:
    """Start a real offline run in `directory`."""
    import wandb

    quiet = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True, silent=True)
    return wandb.init(
        project="tests", mode="offline", dir=str(directory), settings=quiet, reinit="finish_previous", **settings
    )


def records(run: Any) -> list[dict[str, Any]]:
    """Return all records in a finished run's file."""
    tool = Path(sys.executable).with_name("wandb")
    folder = Path(run.dir).parent
    output = subprocess.run(
        [tool, "leet", "inspect", "--json", folder],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "WANDB_SILENT": "true"},
    )
    return [json.loads(line) for line in output.stdout.splitlines()]


def rows(run: Any) -> list[dict[str, Any]]:
    """Return the rows of a finished run."""
    return [record["history"]["item"] for record in records(run) if record["type"] == "history"]


class MemoryRun:
    """W&B's rules for rows, in memory: what `handlePartialHistorySync` of wandb-core does.

    `meddle` is called before and after each call of the sink: at these moments the trainer's thread may log.
    """

    def __init__(self, meddle: Callable[[], None] = lambda: None, starting_step: int = 0) -> None:
        self.rows: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.defined: dict[str, dict[str, Any]] = {}
        self.finished = False
        self._meddle, self._row, self._step = meddle, dict[str, Any](), starting_step

    def define_metric(self, name: str, **options: Any) -> None:
        self.defined[name] = options

    @property
    def step(self) -> int:
        self._meddle()
        step = self._step
        self._meddle()
        return step

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self._meddle()
        self.trainer_log(data, step, commit)
        self._meddle()

    def trainer_log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        if self.finished:
            raise RuntimeError("the run is finished")
        if step is not None and step > self._step:
            self._finish_row(step)
        elif step is not None and step < self._step:
            self.refused.append(data)
            return
        self._row.update(data)
        if commit or (commit is None and step is None):
            self._finish_row(self._step + 1)

    def finish(self) -> None:
        self._finish_row(self._step + 1)
        self.finished = True

    def _finish_row(self, following: int) -> None:
        if self._row:
            self.rows.append({**self._row, "_step": self._step})
            self.summary.update(self._row)
        self._row, self._step = {}, following
