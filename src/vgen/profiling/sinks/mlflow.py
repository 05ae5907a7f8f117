"""MLflow: logs the aggregates of each step to the caller's run, as one batch."""

from __future__ import annotations

import posixpath
import re
from typing import Any

from ...errors import needs_extra
from ..span_model import Sink, Step

MAX_METRICS = 1000
"""MLflow accepts no more metrics in one request."""
MAX_NAME = 250
"""MLflow accepts no longer names."""


class MlflowSink(Sink):
    """Logs each ended step through `client`, an `mlflow.MlflowClient`, to `run`: a run ID or an `mlflow.ActiveRun`.

    Names are those of `row.summary()`, with the characters replaced that MLflow refuses; the step is the trainer's
    number. MLflow keeps a point for each metric, step and time, so vgen overwrites nothing that the trainer logs. The
    requests, with all retries of MLflow, run on the sink's worker thread. The caller ends the run.

        with mlflow.start_run() as run:
            with ProfilingContext([MlflowSink(mlflow.MlflowClient(), run)]) as profiling:
                ...
    """

    inline = False

    def __init__(self, client: Any, run: Any) -> None:
        with needs_extra("MlflowSink", "MLflow", "mlflow"):
            from mlflow.entities import Metric
        self.client = client
        self.run_id: str = run if isinstance(run, str) else run.info.run_id
        self._metric: Any = Metric

    def on_step(self, step: Step) -> None:
        now = (step.end_unix_ns or step.start_unix_ns) // 1_000_000
        metrics = [self._metric(metric_name(k), v, now, step.number) for k, v in step.summary().items()]
        for start in range(0, len(metrics), MAX_METRICS):
            # `synchronous`: if MLflow's background thread fails, vgen cannot count the loss
            self.client.log_batch(self.run_id, metrics[start : start + MAX_METRICS], synchronous=True)


def metric_name(name: str) -> str:
    """Return `name` in a form that MLflow accepts: only word characters, blanks and `/.-:`, and a normalized path."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(allowed).lstrip("./")[:MAX_NAME].rstrip("/") or "_"
