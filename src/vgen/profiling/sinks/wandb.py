"""Weights & Biases: logs the aggregates of steps as rows of the caller's run, on an axis of their own."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from ...errors import needs_extra
from .. import semconv
from ..aggregation import Histogram, Row
from ..key_figures import HISTOGRAMS, PREFIX, key_figures, log_key
from ..span_model import Sink, Step

STEP_METRIC = "vgen/step"
"""The number of the last step in a row: the horizontal axis of all keys that start with `vgen/`."""
STEPS = "vgen/steps"
"""The number of steps in a row: 1 if the trainer logs each step."""
HISTOGRAM = ".histogram"
BINS = 32
_POINTS = 64
_ROW_MARK = PREFIX + semconv.STEP + ".duration.sum"
"""Its value tells a row from all others: the summed duration of its steps."""


class WandbSink(Sink):
    """Logs the rows of ended steps to `run`. The caller opens the run with `wandb.init`, and finishes it.

    No row of the trainer's is lost or overwritten, whatever it passes as `step=`. W&B's own step belongs to the
    trainer: vgen adds its keys to the trainer's next row and never finishes a row itself. Each step is in exactly one
    row. If the trainer logs less often than it steps, a row has all steps since the last one; its percentiles are over
    all their values. Close or flush the context before `run.finish()`: what comes later is counted in `lost`. In a
    forked child the sink logs nothing.

    W&B's calls block while its service hangs. Here they run on the sink's worker thread.

    Args:
        run: The W&B run.
        commit: Write a separate row for each step. For runs to which nobody else logs with `step=`, and necessary for
            `mode="shared"`, where W&B has no steps.
        detail: Log all numbers of `Step.summary` and the distribution of each histogram. By default a row has at most
            30 numbers besides your own (`vgen.profiling.key_figures`), and the distributions of the requests' seconds
            and of the completions' lengths.
        histograms: Whether to log distributions, as `<name>.histogram`. Span durations have none.

    Example:
        with wandb.init(project="grpo") as run, ProfilingContext([WandbSink(run)]) as profiling:
            for n in range(steps):
                with profiling.step(n):
                    ...
                run.log({"loss": loss}, step=n)      # or without step=, or every tenth step
    """

    inline = False

    def __init__(self, run: Any, *, commit: bool = False, detail: bool = False, histograms: bool = True) -> None:
        self.run = run
        self._detail = detail
        self._commit = commit
        self._histogram = _histogram_class() if histograms else None
        self._waiting = _Steps()
        """Steps that are not logged yet."""
        self._open = _Steps()
        """Steps in the row that W&B holds open, at its step `_open_at`."""
        self._open_at = -1
        self._unconfirmed = 0
        self._sending = self._closed = self._forked = False
        self._defined = {STEP_METRIC}
        run.define_metric(STEP_METRIC, hidden=True)

    @property
    def lost(self) -> int:
        """Steps that W&B did not accept, or did not confirm. Waiting steps count once nothing more is sent."""
        return self._unconfirmed + (self._waiting.count if self._closed or self._sending else 0)

    def on_step(self, step: Step) -> None:
        if self._forked:
            return
        self._waiting.add(step)
        if self._commit:
            self.on_idle()

    def on_idle(self) -> None:
        self._sending = True
        try:
            self._send()
        finally:
            self._sending = False

    def flush(self, timeout: float) -> None:
        self.on_idle()

    def close(self, timeout: float) -> None:
        self._closed = True
        self.on_idle()

    def after_fork(self) -> None:
        """Log nothing in a forked child: the run, and the row that it holds open, belong to the parent process."""
        self._forked, self._waiting, self._open = True, _Steps(), _Steps()

    def _send(self) -> None:
        if not self._waiting.count:
            return
        if self._commit:
            self._log(self._waiting, commit=True)
            self._waiting = _Steps()
            return
        if getattr(self.run, "_is_finished", False):  # `run.step` would wait half a minute for nothing
            raise RuntimeError("the W&B run was finished before its sink was closed: close the context first")
        step_before = self.run.step
        if step_before != self._open_at:  # the trainer's log has finished the row that held the open steps
            self._open = _Steps()
        steps = _Steps(self._open, self._waiting)
        # Open steps are logged again, together with the waiting ones. If the trainer finished their row at this very
        # moment, they would be in two rows. So the log names W&B's current step, and W&B refuses it if it is too late.
        refusable = self._open.count > 0
        mark = self._log(steps, step=step_before if refusable else None, commit=False)
        try:
            step_after = self.run.step
            finished = step_after != step_before and self.run.summary.get(_ROW_MARK) == mark
        except Exception:
            self._unconfirmed += self._waiting.count
            self._waiting, self._open = _Steps(), _Steps()
            raise
        if step_after != step_before and refusable and not finished:
            self._send()  # W&B refused the row; the second time the open steps are known to be in a finished one
            return
        self._waiting, self._open, self._open_at = _Steps(), _Steps() if finished else steps, step_after

    def _log(self, steps: _Steps, **options: Any) -> float | None:
        """Log one row, and return its mark."""
        row = self._row(steps)
        for key in row.keys() - self._defined:
            # By full names: if a key matches two patterns, W&B takes either, and Hugging Face's callback defines `*`.
            for leaf in ("", "._type", ".bins", ".values") if key.endswith(HISTOGRAM) else ("",):
                self.run.define_metric(key + leaf, step_metric=STEP_METRIC)
            self._defined.add(key)
        self.run.log(row, **options)
        return row.get(_ROW_MARK)

    def _row(self, steps: _Steps) -> dict[str, Any]:
        summary = steps.row.summary()
        figures = summary if self._detail else key_figures(summary)
        row: dict[str, Any] = {log_key(name): value for name, value in figures.items()}
        if self._histogram is not None:
            for name in [n.removesuffix(".p99") for n in summary if n.endswith(".p99")]:
                wanted = self._detail or name in HISTOGRAMS or not name.startswith(semconv.RESERVED)
                histogram = None if name.endswith(".duration") or not wanted else steps.row.histogram(name)
                if histogram is not None:
                    row[log_key(name) + HISTOGRAM] = self._histogram(np_histogram=_bins(histogram))
        return {**row, STEPS: steps.count, STEP_METRIC: steps.last}


class _Steps:
    """The steps of one row."""

    def __init__(self, *parts: _Steps) -> None:
        self.row, self.count, self.last = Row(), 0, 0
        for part in parts:
            if part.count:
                self.row.merge(part.row)
                self.count += part.count
                self.last = part.last

    def add(self, step: Step) -> None:
        self.row.merge(step.row)
        self.count += 1
        self.last = step.number


def _bins(histogram: Histogram) -> tuple[Any, Any]:
    """Counts in bins of equal width, and the edges. Up to `_POINTS` values, each is in its bin; beyond, to 2 %."""
    import numpy as np

    points = min(histogram.count, _POINTS)
    gaps = max(histogram.count - 1, 1)
    # Slightly more than the rank, because rounding must not give the rank below.
    ranks = np.linspace(0, histogram.count - 1, points) + 1e-6
    values = [histogram.quantile(min(rank / gaps, 1.0)) for rank in ranks]
    shares, edges = np.histogram(values, bins=BINS, range=(histogram.minimum, histogram.maximum))
    cumulated = np.round(np.cumsum(shares) * (histogram.count / points))
    return np.diff(cumulated, prepend=0).astype(int), edges


def _histogram_class() -> Any:
    with needs_extra("WandbSink", "W&B", "wandb"):
        from wandb import Histogram as wandb_histogram
    # W&B imports pandas with its first histogram. That takes two seconds; a short run could end before.
    with suppress(Exception):
        import_module("pandas")
    return wandb_histogram
