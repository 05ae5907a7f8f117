"""MLflow: the aggregates of each step, in one batch, in the caller's run."""

from __future__ import annotations

import posixpath
import re
from typing import Any

from ...errors import MissingExtraError
from ..records import Sink, Step

BATCH = 1000
"""MLflow takes no more metrics in one request."""
LONGEST_NAME = 250


class MlflowSink(Sink):
    """Logs every ended step through `client`, an `mlflow.MlflowClient`, to `run`: a run's id, or the run itself.

        with mlflow.start_run() as run:
            with ProfilingContext([MlflowSink(mlflow.MlflowClient(), run)]) as profiling:
                ...

    Names are `row.summary()`'s own, except for what MLflow refuses in a name; the step is the trainer's
    number. MLflow keeps every point by its metric, step and time: nothing that the trainer logs is
    touched. Requests, with all of MLflow's retries, are made on the sink's worker thread. The run is the
    caller's to end.
    """

    inline = False

    def __init__(self, client: Any, run: Any) -> None:
        try:
            from mlflow.entities import Metric
        except ImportError as error:
            raise MissingExtraError("MlflowSink", "MLflow", "mlflow") from error
        self.client = client
        self.run_id: str = run if isinstance(run, str) else run.info.run_id
        self._metric: Any = Metric

    def on_step(self, step: Step) -> None:
        now = (step.end_unix_ns or step.start_unix_ns) // 1_000_000
        metrics = [self._metric(metric_name(k), v, now, step.number) for k, v in step.summary().items()]
        for start in range(0, len(metrics), BATCH):
            # not in MLflow's own background: a failure there would never be counted
            self.client.log_batch(self.run_id, metrics[start : start + BATCH], synchronous=True)


def metric_name(name: str) -> str:
    """`name` as MLflow takes it: word characters, blanks and `/.-:`, and as a path one that stays where it is."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(allowed).lstrip("./")[:LONGEST_NAME].rstrip("/") or "_"
