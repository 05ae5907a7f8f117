"""Weights & Biases: the aggregates of the steps as rows in the caller's run, on an axis of their own."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from ...errors import MissingExtraError
from .. import names
from ..records import Sink, Step
from ..sketch import Histogram, Row

PREFIX = "vgen/"
STEP_METRIC = "vgen/step"
"""The number of the last step that a row covers: the horizontal axis of everything that begins with `vgen/`."""
STEPS = "vgen/steps"
"""How many steps a row covers: 1 where the trainer logs every step."""
HISTOGRAM = ".histogram"
BINS = 32
_POINTS = 64
_MARK = PREFIX + names.STEP + ".duration.sum"


class WandbSink(Sink):
    """Logs the rows of ended steps to `run`, which the caller has opened with `wandb.init` and finishes itself.

        with wandb.init(project="grpo") as run, ProfilingContext([WandbSink(run)]) as profiling:
            for n in range(steps):
                with profiling.step(n):
                    ...
                run.log({"loss": loss}, step=n)      # or without step=, or every tenth step

    No row of the trainer's is lost or overwritten, whatever it passes as `step=`, because W&B's own step
    stays the trainer's: vgen's keys travel with the trainer's next row, and nothing here ever finishes a
    row. Each step is in exactly one of the run's rows. Where the trainer logs more seldom than it steps,
    a row covers all steps since (percentiles over all their values, `vgen/steps` says how many). Into a
    run that nobody else logs to with `step=`, `commit=True` writes a row of its own for every step; so
    it must be with `mode="shared"`, where W&B keeps no steps.

    `histograms` adds the distribution of each histogram instrument as `<name>.histogram`, span durations
    apart. W&B's calls block for as long as its service stalls; here they do so on the sink's worker
    thread. Close or flush the context before `run.finish()`: what comes later is counted in `lost`. A
    forked child logs nothing.
    """

    inline = False

    def __init__(self, run: Any, *, commit: bool = False, histograms: bool = True) -> None:
        self.run = run
        self._commit = commit
        self._histogram = _histogram_class() if histograms else None
        self._waiting = _Steps()  # not yet given to W&B
        self._open = _Steps()  # in the row that W&B holds open, at its step `_at`
        self._at = -1
        self._unconfirmed = 0
        self._sending = self._closed = self._forked = False
        self._defined = {STEP_METRIC}
        run.define_metric(STEP_METRIC, hidden=True)

    @property
    def lost(self) -> int:
        """Steps that W&B did not take, or took without saying so. Those that wait count once nothing follows."""
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
        """The run, and the row that it holds open, are the parent's."""
        self._forked, self._waiting, self._open = True, _Steps(), _Steps()

    def _send(self) -> None:
        if not self._waiting.count:
            return
        if self._commit:
            self._log(self._waiting, commit=True)
            self._waiting = _Steps()
            return
        if getattr(self.run, "_is_finished", False):  # whose step W&B waits for half a minute, in vain
            raise RuntimeError("the W&B run was finished before its sink was closed")
        now = self.run.step
        if now != self._at:  # the trainer's log has finished the row that held the open steps
            self._open = _Steps()
        both = _Steps(self._open, self._waiting)
        # What is open is logged again with more in it. Were its row finished right now, it would be in two:
        # so its step is named, the one that W&B is at, and W&B refuses what comes too late.
        refusable = self._open.count > 0
        mark = self._log(both, step=now if refusable else None, commit=False)
        try:
            after = self.run.step
            finished = after != now and self.run.summary.get(_MARK) == mark
        except Exception:
            self._unconfirmed += self._waiting.count
            self._waiting, self._open = _Steps(), _Steps()
            raise
        if after != now and refusable and not finished:
            self._send()  # `now` is not `_at` any more
            return
        self._waiting, self._open, self._at = _Steps(), _Steps() if finished else both, after

    def _log(self, steps: _Steps, **how: Any) -> float | None:
        """Log one row; its mark, a number that no other row has."""
        row = self._row(steps)
        for key in row.keys() - self._defined:
            # Each by its name: of two patterns that match a key W&B takes either, and Hugging Face's callback has `*`.
            for leaf in ("", "._type", ".bins", ".values") if key.endswith(HISTOGRAM) else ("",):
                self.run.define_metric(key + leaf, step_metric=STEP_METRIC)
            self._defined.add(key)
        self.run.log(row, **how)
        return row.get(_MARK)

    def _row(self, steps: _Steps) -> dict[str, Any]:
        summary = steps.row.summary()
        row: dict[str, Any] = {key(name): value for name, value in summary.items()}
        if self._histogram is not None:
            for name in [n.removesuffix(".p99") for n in summary if n.endswith(".p99")]:
                histogram = None if name.endswith(".duration") else steps.row.histogram(name)
                if histogram is not None:
                    row[key(name) + HISTOGRAM] = self._histogram(np_histogram=_bins(histogram))
        return {**row, STEPS: steps.count, STEP_METRIC: steps.last}


class _Steps:
    """Steps that one row stands for."""

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


def key(name: str) -> str:
    """What `name` of a step's summary is called in the run."""
    return PREFIX + name.removeprefix("vgen.")


def _bins(histogram: Histogram) -> tuple[Any, Any]:
    """Counts in bins of equal width, and their edges: each value where it lies up to `_POINTS` of them, else to 2 %."""
    import numpy as np

    points = min(histogram.count, _POINTS)
    gaps = max(histogram.count - 1, 1)
    # a hair more than the rank, which must not be rounded to the one below
    ranks = np.linspace(0, histogram.count - 1, points) + 1e-6
    values = [histogram.quantile(min(rank / gaps, 1.0)) for rank in ranks]
    shares, edges = np.histogram(values, bins=BINS, range=(histogram.minimum, histogram.maximum))
    cumulated = np.round(np.cumsum(shares) * (histogram.count / points))
    return np.diff(cumulated, prepend=0).astype(int), edges


def _histogram_class() -> Any:
    try:
        from wandb import Histogram as found
    except ImportError as error:
        raise MissingExtraError("WandbSink", "W&B", "wandb") from error
    # W&B imports it with the first histogram that it is given: two seconds, in which a short run would be over.
    with suppress(Exception):
        import_module("pandas")
    return found
