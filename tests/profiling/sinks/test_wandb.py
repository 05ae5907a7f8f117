"""The W&B sink beside a trainer that logs to the same run."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import wandb_runs
from helpers.operations import calls_made
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.errors import MissingExtraError
from vgen.profiling import Instrument, ProfilingContext, semconv
from vgen.profiling.aggregation import ACCURACY, Histogram
from vgen.profiling.sinks.wandb import PREFIX, STEP_METRIC, STEPS, WandbSink

DURATIONS = PREFIX + semconv.STEP + ".duration.count"
E2E = semconv.REQUEST_E2E
TOKENS = semconv.GENERATED_TOKENS


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    run = wandb_runs.start(tmp_path)
    yield run
    run.finish()


def work(profiling: ProfilingContext, n: int) -> None:
    """What a step measures: numbers that tell steps apart."""
    profiling.record(TOKENS, 10 + n)
    profiling.record_many(E2E, [n + 0.25, n + 0.5, n + 0.75])


def covered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if STEP_METRIC in row]


def check_steps(rows: list[dict[str, Any]], steps: int) -> None:
    """Every step is in exactly one row, and in a row is what its steps measured, no more and no less."""
    following = 0
    for row in covered(rows):
        mine = range(following, following + row[STEPS])
        following += row[STEPS]
        assert row[STEP_METRIC] == mine[-1]
        assert row[DURATIONS] == len(mine)
        assert row["vgen/generate.output_tokens"] == sum(10 + n for n in mine)
        assert row["vgen/request.e2e.count"] == 3 * len(mine)
        assert row["vgen/request.e2e.min"] == mine[0] + 0.25
        assert row["vgen/request.e2e.max"] == mine[-1] + 0.75
        assert row["vgen/request.e2e.sum"] == pytest.approx(sum(3 * n + 1.5 for n in mine))
        values = sorted(n + fraction for n in mine for fraction in (0.25, 0.5, 0.75))
        median = values[int(0.5 * (len(values) - 1))]
        assert row["vgen/request.e2e.p50"] == pytest.approx(median, rel=2 * ACCURACY)
        assert sum(row["vgen/request.e2e.histogram.values"]) == 3 * len(mine)
    assert following == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("with_step", "order"),
    [
        pytest.param(True, "after vgen's row", id="step=-after vgen's row"),
        pytest.param(False, "within the step", id="no step=-within the step"),
        *(
            pytest.param(with_step, order, id=f"{'step=' if with_step else 'no step='}-{order}")
            for with_step, order in (
                (True, "within the step"),
                (True, "before vgen's row"),
                (False, "before vgen's row"),
                (False, "after vgen's row"),
            )
        ),
    ],
)
def test_every_row_of_the_trainer_and_every_step_is_in_the_run(run: Any, with_step: bool, order: str) -> None:
    profiling = ProfilingContext([WandbSink(run, detail=True)])

    def trainer_log(n: int) -> None:
        how = {"step": n} if with_step else {}
        run.log({"loss": n + 0.5}, **how)
        run.log({"reward": n + 0.25}, **(how or {"commit": False}))

    for n in range(5):
        with profiling.step(n):
            work(profiling, n)
            if order == "within the step":
                trainer_log(n)
        if order == "before vgen's row":
            trainer_log(n)
        profiling.flush()
        if order == "after vgen's row":
            trainer_log(n)
    profiling.close()
    run.finish()
    rows = wandb_runs.rows(run)
    check_steps(rows, 5)
    assert [row["loss"] for row in rows if "loss" in row] == [n + 0.5 for n in range(5)]
    assert [row["reward"] for row in rows if "reward" in row] == [n + 0.25 for n in range(5)]
    if with_step:  # and each in the row of its own step
        assert all(row["_step"] == row["loss"] - 0.5 == row["reward"] - 0.25 for row in rows if "loss" in row)
        assert sum("loss" in row for row in rows) == 5


@pytest.mark.slow
@pytest.mark.parametrize("with_step", [pytest.param(True, id="step="), pytest.param(False, id="no step=")])
def test_a_trainer_that_logs_every_tenth_step_gets_the_aggregates_of_all_steps_since(run: Any, with_step: bool) -> None:
    profiling = ProfilingContext([WandbSink(run, detail=True)])
    for n in range(25):
        with profiling.step(n):
            work(profiling, n)
        profiling.flush()
        if n % 10 == 9:
            run.log({"loss": float(n)}, **({"step": n} if with_step else {}))
    profiling.close()
    run.finish()
    rows = wandb_runs.rows(run)
    check_steps(rows, 25)
    assert [row["loss"] for row in rows if "loss" in row] == [9, 19]
    assert [row[STEPS] for row in covered(rows)] == [10, 10, 5]


@pytest.mark.slow
def test_a_trainer_on_its_own_thread_in_a_hurry(run: Any) -> None:
    sink = WandbSink(run, detail=True)
    profiling = ProfilingContext([sink])
    logged = itertools.count()
    done = threading.Event()

    def train() -> None:
        while not done.wait(0.002):
            run.log({"loss": float(next(logged))})

    trainer = threading.Thread(target=train)
    trainer.start()
    for n in range(150):
        with profiling.step(n):
            work(profiling, n)
        sink_sees_it = n % 3 == 0
        if sink_sees_it:
            profiling.flush()
    done.set()
    trainer.join()
    assert profiling.close()
    run.finish()
    rows = wandb_runs.rows(run)
    check_steps(rows, 150)
    assert [row["loss"] for row in rows if "loss" in row] == list(range(next(logged)))
    assert sink.lost == 0


@settings(max_examples=150, deadline=None)
@given(
    trainer=st.lists(st.sampled_from(["", "", "", "plain", "ahead", "same", "merge"]), max_size=60),
    flushes=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_a_trainer_that_logs_at_any_moment_whatever(trainer: list[str], flushes: list[bool]) -> None:
    logs = iter(trainer)
    losses = itertools.count()

    def meddle() -> None:
        what = next(logs, "")
        if what == "":
            return
        n = next(losses)
        data = {f"loss {n}": n}
        if what == "plain":
            run.trainer_log(data)
        elif what == "merge":
            run.trainer_log(data, commit=False)
        else:
            run.trainer_log(data, step=run._step + (what == "ahead"))

    run = wandb_runs.MemoryRun(meddle)
    sink = WandbSink(run, detail=True, histograms=False)
    profiling = Steps()
    for n, flush in enumerate(flushes):
        sink.on_step(profiling.step(n))
        if flush:
            sink.on_idle()
    sink.close(1.0)
    run.finish()
    rows = covered(run.rows)
    assert sum(row[STEPS] for row in rows) == len(flushes)
    assert [row[STEP_METRIC] for row in rows] == sorted({row[STEP_METRIC] for row in rows})
    assert sum(row["vgen/generate.output_tokens"] for row in rows) == sum(10 + n for n in range(len(flushes)))
    assert all(f"loss {n}" in itertools.chain(*run.rows) for n in range(next(losses)))
    assert all(STEP_METRIC in data for data in run.refused)  # the trainer's never


class Steps:
    """Makes ended steps."""

    def step(self, n: int) -> Any:
        profiling = ProfilingContext()
        with profiling.step(n) as step:
            work(profiling, n)
        return step


@pytest.mark.slow
def test_steps_after_the_trainers_last_log_are_in_the_file(run: Any) -> None:
    profiling = ProfilingContext([WandbSink(run, detail=True)])
    for n in range(4):
        with profiling.step(n):
            work(profiling, n)
        profiling.flush()
        if n == 0:
            run.log({"loss": 0.5})
    profiling.close()
    run.finish()
    rows = wandb_runs.rows(run)
    check_steps(rows, 4)
    assert [row[STEPS] for row in covered(rows)] == [1, 3]


@pytest.mark.slow
def test_a_final_log_with_the_last_step_once_more_is_kept_after_close(run: Any) -> None:
    profiling = ProfilingContext([WandbSink(run, detail=True)])
    for n in range(3):
        with profiling.step(n):
            work(profiling, n)
        run.log({"loss": float(n)}, step=n)
    profiling.close()
    run.log({"train_runtime": 12.5}, step=2)
    run.finish()
    rows = wandb_runs.rows(run)
    check_steps(rows, 3)
    assert [row["_step"] for row in rows if "train_runtime" in row] == [2]


@pytest.mark.slow
@pytest.mark.fault(
    point="W&B, MLflow and Trackio",
    did="The run is finished before its sink",
    happens="The loss is counted",
    within=60,
)
def test_a_run_that_was_finished_first_is_a_counted_loss(run: Any, waits: Any) -> None:
    sink = WandbSink(run, detail=True)
    profiling = ProfilingContext([sink])
    with profiling.step(0):
        work(profiling, 0)
    profiling.flush()
    run.finish()
    for n in (1, 2):
        with profiling.step(n):
            work(profiling, n)
    profiling.close(20)
    assert waits.ended[-1], "it does not hang until the deadline"
    assert profiling.dropped() == {"WandbSink": 2}
    check_steps(wandb_runs.rows(run), 1)


@pytest.mark.fault(
    point="W&B, MLflow and Trackio",
    did="W&B's log call raises",
    happens="Rows wait and are logged later; losses are counted",
    within=20,
)
def test_a_failing_run_counts_its_loss_and_recovers() -> None:
    run = wandb_runs.MemoryRun()
    sink = WandbSink(run, detail=True, histograms=False)
    steps = Steps()
    sink.on_step(steps.step(0))
    run.finished = True
    with pytest.raises(RuntimeError):
        sink.on_idle()
    assert sink.lost == 0  # it waits
    run.finished = False
    sink.on_step(steps.step(1))
    sink.on_idle()
    run.finish()
    assert [row[STEPS] for row in run.rows] == [2]
    sink.on_step(steps.step(2))
    with pytest.raises(RuntimeError):
        sink.close(1.0)
    assert sink.lost == 1


@pytest.mark.fault(
    point="W&B, MLflow and Trackio",
    did="W&B takes a row and does not confirm it",
    happens="It is not logged twice",
    within=20,
)
def test_a_step_that_wandb_took_but_did_not_confirm_counts_as_lost_and_is_not_told_twice() -> None:
    fails = iter([False, False, True])  # the third time that the sink asks for W&B's step

    def meddle() -> None:
        if asking[0] and next(fails, False):
            raise TimeoutError

    asking = [False]

    class Run(wandb_runs.MemoryRun):
        @property
        def step(self) -> int:
            asking[0] = True
            try:
                return super().step
            finally:
                asking[0] = False

    run = Run(meddle)
    sink = WandbSink(run, detail=True, histograms=False)
    steps = Steps()
    sink.on_step(steps.step(0))
    with pytest.raises(TimeoutError):
        sink.on_idle()
    run.trainer_log({"loss": 1.0})
    sink.on_step(steps.step(1))
    sink.on_idle()
    run.finish()
    assert sink.lost == 1
    assert [row[STEPS] for row in covered(run.rows)] == [1, 1]


@pytest.mark.slow
def test_a_row_of_its_own_for_each_step_where_nobody_passes_a_step(run: Any) -> None:
    profiling = ProfilingContext([WandbSink(run, commit=True, detail=True)])
    for n in range(6):
        with profiling.step(n):
            work(profiling, n)
    profiling.close()
    run.finish()
    rows = wandb_runs.rows(run)
    check_steps(rows, 6)
    assert [row[STEPS] for row in rows] == [1] * 6


@pytest.mark.slow
def test_vgens_keys_keep_their_axis_beside_a_pattern_that_matches_everything(run: Any) -> None:
    run.define_metric("train/global_step")  # as Hugging Face's callback does
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    profiling = ProfilingContext([WandbSink(run, detail=True)])
    with profiling.step(7):
        work(profiling, 7)
    profiling.close()
    run.finish()
    [row] = wandb_runs.rows(run)
    assert row[STEP_METRIC] == 7
    assert "train/global_step" not in row  # W&B would have added it for each key that went to the other axis
    metrics = [record["metric"] for record in wandb_runs.records(run) if record["type"] == "metric"]
    axes = {metric.get("name"): metric.get("step_metric") for metric in metrics}
    assert {axes.get(key) for key in row if key.startswith(PREFIX) and key != STEP_METRIC} == {STEP_METRIC}


@pytest.mark.slow
def test_a_resumed_run_continues_the_axis(tmp_path: Path) -> None:
    axis: list[int] = []
    for first in (0, 3):
        run = wandb_runs.start(tmp_path / str(first), id="same")
        run.log({"restored": 1.0}, step=100 + first)  # W&B's own step of a resumed run is where it was
        profiling = ProfilingContext([WandbSink(run, detail=True)])
        for n in range(first, first + 3):
            with profiling.step(n):
                work(profiling, n)
            profiling.flush()
            run.log({"loss": 0.1}, step=101 + n)
        profiling.close()
        run.finish()
        rows = wandb_runs.rows(run)
        axis += [row[STEP_METRIC] for row in covered(rows)]
        assert sum("loss" in row for row in rows) == 3
    assert axis == list(range(6))


def test_a_run_that_starts_at_a_later_step_of_wandbs() -> None:
    run = wandb_runs.MemoryRun(starting_step=40)
    run._step, later = 0, 40  # wandb-core reads the starting step with the first row

    original = run.trainer_log

    def first(*arguments: Any, **how: Any) -> None:
        run._step = max(run._step, later)
        original(*arguments, **how)

    run.trainer_log = first  # type: ignore[method-assign]
    sink = WandbSink(run, detail=True, histograms=False)
    for n in range(3):
        sink.on_step(Steps().step(n))
        sink.on_idle()
    run.finish()
    assert [(row[STEPS], row["_step"]) for row in run.rows] == [(3, 40)]


def test_histograms_hold_every_value(run: Any) -> None:
    rng = np.random.default_rng(0)
    many = rng.lognormal(0, 1, 5000)
    profiling = ProfilingContext([WandbSink(run, detail=True)])
    with profiling.step(0):
        profiling.record_many(E2E, many)
        profiling.record_many(semconv.COMPLETION_LENGTH, [512] * 30)
        profiling.record_many(semconv.REQUEST_TTFT, [1.0, 2.0, 2.0, 5.0])
        profiling.record_many(Instrument("my.reward", "histogram"), [-1.0, 0.0, 1.0])
        profiling.record_many(semconv.REQUEST_TPOT, [math.nan])
    profiling.close()
    run.finish()
    [row] = wandb_runs.rows(run)

    def read(key: str) -> tuple[list[int], list[float]]:
        assert row[f"vgen/{key}.histogram._type"] == "histogram"
        return row[f"vgen/{key}.histogram.values"], row[f"vgen/{key}.histogram.bins"]

    counts, edges = read("request.e2e")
    assert sum(counts) == 5000
    assert (edges[0], edges[-1]) == pytest.approx((many.min(), many.max()))
    true, _ = np.histogram(many, bins=edges)
    assert np.abs(np.cumsum(counts) - np.cumsum(true)).max() <= 5000 / 50
    counts, edges = read("completion.length")
    assert sum(counts) == max(counts) == 30
    counts, edges = read("request.time_to_first_token")
    assert [counts[0], counts[8], counts[-1], sum(counts)] == [1, 2, 1, 4]
    assert sum(read("my.reward")[0]) == 3
    assert not any("per_output_token.histogram" in key for key in row)
    assert not any(key.endswith(".duration.histogram.values") for key in row)


def test_by_default_a_row_has_few_numbers_and_two_distributions_besides_the_callers_own(run: Any) -> None:
    profiling = ProfilingContext([WandbSink(run)])
    with profiling.step(0), profiling.span("reward"):
        for name in semconv.SPANS:
            if name != semconv.STEP:
                with profiling.span(name):
                    pass
        for instrument in semconv.METRICS.values():
            profiling.record_many(instrument, [1.0, 2.0])
        profiling.record_many(Instrument("my.score", "histogram"), [3.0])
    profiling.close()
    run.finish()
    [row] = wandb_runs.rows(run)
    distributions = {name.partition(".histogram")[0] for name in row if ".histogram." in name}
    assert distributions == {"vgen/request.e2e", "vgen/completion.length", "vgen/my.score"}
    numbers = {name for name in row if name.startswith("vgen/") and ".histogram." not in name}
    own = {name for name in numbers if "reward" in name or "my.score" in name}
    assert {"vgen/reward.duration.sum", "vgen/my.score.p50"} <= own
    assert len(numbers - own - {STEPS, STEP_METRIC}) <= 30


def test_nan_and_infinity_are_logged_as_such(run: Any) -> None:
    profiling = ProfilingContext([WandbSink(run, detail=True)])
    with profiling.step(0):
        profiling.record(semconv.THROUGHPUT, math.nan)
        profiling.record(Instrument("my.gauge", "gauge"), -math.inf)
        profiling.record_many(E2E, [1.0, math.inf])
    profiling.close()
    run.finish()
    [row] = wandb_runs.rows(run)
    assert row["vgen/generate.throughput"] == "NaN"
    assert row["vgen/my.gauge"] == "-Infinity"
    assert row["vgen/request.e2e.nonfinite"] == 1
    assert row["vgen/request.e2e.max"] == 1.0


@pytest.mark.slow
def test_the_dict_way(run: Any) -> None:
    profiling = ProfilingContext()
    for n in range(2):
        with profiling.step(n) as row:
            work(profiling, n)
        run.log({"loss": 0.5, **row.summary()}, step=n)
    run.finish()
    rows = wandb_runs.rows(run)
    assert [row["_step"] for row in rows] == [0, 1]
    assert [row["vgen.request.e2e.max"] for row in rows] == [0.75, 1.75]
    assert [row["vgen.generate.output_tokens"] for row in rows] == [10, 11]


SHORT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers import wandb_runs
from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.wandb import WandbSink

run = wandb_runs.start(Path("."))
profiling = ProfilingContext([WandbSink(run, detail=True)])
before = set(sys.modules)
with profiling.step(0):
    profiling.record_many(semconv.REQUEST_E2E, [0.25, 0.5])
assert profiling.close(), profiling.dropped()
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
run.finish()
"""


@pytest.mark.slow
def test_a_run_that_is_over_at_once_does_not_spend_its_last_seconds_on_imports(tmp_path: Path) -> None:
    """W&B imports pandas with its first histogram. `close()` gives the sink two seconds, and that would take them."""
    command = [sys.executable, "-c", SHORT, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"numpy", "pandas", "pyarrow"} & set(done.stdout.split())


@pytest.mark.slow
def test_a_disabled_run_takes_everything() -> None:
    import wandb

    run = wandb.init(mode="disabled")
    sink = WandbSink(run, detail=True)
    profiling = ProfilingContext([sink])
    with profiling.step(0):
        work(profiling, 0)
    assert profiling.close()
    assert sink.lost == 0


def test_without_wandb_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"WandbSink needs W&B: pip install 'vgen\[wandb\]'"):
        WandbSink(wandb_runs.MemoryRun())
    WandbSink(wandb_runs.MemoryRun(), histograms=False)  # a run is all that it takes


@pytest.mark.slow
def test_a_forked_child_leaves_the_run_to_its_parent(run: Any) -> None:
    profiling = ProfilingContext([WandbSink(run, detail=True)])
    with profiling.step(0):
        work(profiling, 0)
    profiling.flush()
    child = os.fork()
    if child == 0:
        with profiling.step(99):
            pass
        profiling.close(0.5)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with profiling.step(1):
        work(profiling, 1)
    profiling.close()
    run.finish()
    check_steps(wandb_runs.rows(run), 2)


def test_merging_steps_leaves_their_own_rows_alone() -> None:
    run = wandb_runs.MemoryRun()
    sink = WandbSink(run, detail=True, histograms=False)
    first, second = (Steps().step(n) for n in (0, 1))
    before = first.row.histogram(E2E.name).quantile(1.0)
    sink.on_step(first)
    sink.on_idle()
    sink.on_step(second)
    sink.on_idle()
    histogram: Histogram = first.row.histogram(E2E.name)
    assert (histogram.count, histogram.quantile(1.0)) == (3, before)


@pytest.mark.slow
def test_the_callers_thread_does_next_to_nothing_more(run: Any) -> None:
    def step(profiling: ProfilingContext) -> None:
        with profiling.step(0):
            with profiling.span("a"):
                pass
            profiling.record(TOKENS, 1)

    alone = ProfilingContext()
    with ProfilingContext([WandbSink(run, detail=True)]) as shown:
        for profiling in (alone, shown):
            step(profiling)
        operations = calls_made(lambda: step(alone))
        assert calls_made(lambda: step(shown)) <= operations + 12  # to queue the row, and to ask for losses


def test_a_histogram_of_two_values_has_each_at_its_end(run: Any) -> None:
    profiling = ProfilingContext([WandbSink(run, detail=True)])
    with profiling.step(0):
        profiling.record_many(E2E, [1.0, 3.0])
    profiling.close()
    run.finish()
    [row] = wandb_runs.rows(run)
    counts = row["vgen/request.e2e.histogram.values"]
    assert (counts[0], counts[-1], sum(counts)) == (1, 1, 2)


def test_a_row_that_the_trainer_finishes_while_it_is_written_is_known_to_be_finished() -> None:
    """Its steps are not written into the next row once more."""
    moments = iter(["", "", "", "log"])  # the last of them: right after the sink's own log call

    def meddle() -> None:
        if next(moments, "") == "log":
            run.trainer_log({"loss": 1.0})

    run = wandb_runs.MemoryRun(meddle)
    sink, steps = WandbSink(run, detail=True, histograms=False), Steps()
    for n in range(2):
        sink.on_step(steps.step(n))
        sink.on_idle()
    run.finish()
    assert [row[STEPS] for row in run.rows] == [1, 1]
    assert "loss" in run.rows[0]
