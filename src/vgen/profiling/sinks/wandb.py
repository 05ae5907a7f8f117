"""Weights & Biases: one row of aggregates for each step, on an axis of its own, in the caller's run."""

from __future__ import annotations

from typing import Any

from ..records import Sink, Step

PREFIX = "vgen/"
STEP_METRIC = "vgen/step"


class WandbSink(Sink):
    """Logs every closed step to `run`, which the caller has opened with `wandb.init` and finishes itself.

    Rows are logged with `commit=False` and never with `step=`, so W&B's own step stays the trainer's:
    they travel with the trainer's next row, under keys that begin with `vgen/`, and none of the
    trainer's rows is lost or overwritten. `wandb.log` may block for as long as W&B's service stalls;
    here it does so on the sink's worker thread.
    """

    inline = False

    def __init__(self, run: Any) -> None:
        self.run = run
        run.define_metric(STEP_METRIC, hidden=True)
        run.define_metric(PREFIX + "*", step_metric=STEP_METRIC)

    def on_step(self, step: Step) -> None:
        row = {PREFIX + name.removeprefix("vgen."): value for name, value in step.summary().items()}
        self.run.log({**row, STEP_METRIC: step.number}, commit=False)
