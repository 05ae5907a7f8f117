"""Trackio: the aggregates of each step as a row in the caller's run."""

from __future__ import annotations

from typing import Any

from ..records import Sink, Step


class TrackioSink(Sink):
    """Logs every ended step to `run`, which the caller has opened with `trackio.init` and finishes itself.

        run = trackio.init(project="grpo")
        with ProfilingContext([TrackioSink(run)]) as profiling:
            ...

    Names are `row.summary()`'s own; the step is the trainer's number. Trackio keeps every row that it is
    given, so none of the trainer's is touched; rows that the trainer logs without `step=` go on counting
    from vgen's last one. Close or flush the context before `run.finish()`.
    """

    inline = False

    def __init__(self, run: Any) -> None:
        self.run = run

    def on_step(self, step: Step) -> None:
        self.run.log(step.summary(), step=step.number)
