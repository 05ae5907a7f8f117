"""Trackio: logs the aggregates of each step to the caller's run."""

from __future__ import annotations

from typing import Any

from ..span_model import Sink, Step


class TrackioSink(Sink):
    """Logs each ended step to `run`. The caller opens the run with `trackio.init`, and finishes it.

    Names are those of `row.summary()`; the step is the trainer's number. Trackio keeps all rows, so vgen overwrites
    none of the trainer's. Rows that the trainer logs without `step=` continue to count from vgen's last step. Close or
    flush the context before `run.finish()`.

        run = trackio.init(project="grpo")
        with ProfilingContext([TrackioSink(run)]) as profiling:
            ...
    """

    inline = False

    def __init__(self, run: Any) -> None:
        self.run = run

    def on_step(self, step: Step) -> None:
        self.run.log(step.summary(), step=step.number)
