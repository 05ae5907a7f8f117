"""The MLflow sink, with a real store in a file."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import pytest

from vgen.errors import MissingExtraError
from vgen.profiling import Instrument, ProfilingContext, semconv
from vgen.profiling.sinks.mlflow import MlflowSink, metric_name


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its own, to a server of its makers
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'store.db'}")


@pytest.fixture
def run(client: Any) -> Any:
    experiment = client.get_experiment_by_name("tests")
    return client.create_run(experiment.experiment_id if experiment else client.create_experiment("tests"))


def points(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_each_step_is_in_the_run_beside_what_the_trainer_logs(client: Any, run: Any) -> None:
    profiling = ProfilingContext([MlflowSink(client, run)])
    for n in (7, 8):
        with profiling.step(n) as row:
            profiling.record(semconv.GENERATED_TOKENS, 10 * n)
            profiling.record_many(semconv.REQUEST_E2E, [0.5, 1.5])
        client.log_metric(run.info.run_id, "loss", n / 10, step=n)
    assert profiling.close()
    assert points(client, run, "vgen.generate.output_tokens") == [(7, 70), (8, 80)]
    assert points(client, run, "vgen.request.e2e.max") == [(7, 1.5), (8, 1.5)]
    assert points(client, run, "loss") == [(7, 0.7), (8, 0.8)]
    assert set(row.summary()) < set(client.get_run(run.info.run_id).data.metrics)


def test_a_run_is_also_known_by_its_id(client: Any, run: Any) -> None:
    with ProfilingContext([MlflowSink(client, run.info.run_id)]) as profiling, profiling.step(0):
        profiling.record(semconv.GENERATED_TOKENS, 1)
    assert points(client, run, "vgen.generate.output_tokens") == [(0, 1)]


def test_a_wide_row_takes_several_requests(client: Any, run: Any) -> None:
    profiling = ProfilingContext([MlflowSink(client, run)])
    with profiling.step(0):
        for i in range(1100):
            profiling.record(Instrument(f"gauge.{i}", "gauge"), i)
    assert profiling.close(timeout=30.0)  # MLflow's database takes seconds on a busy machine
    assert profiling.dropped() == {}
    assert points(client, run, "gauge.0") + points(client, run, "gauge.1099") == [(0, 0), (0, 1099)]


def test_nan_and_infinity_are_taken(client: Any, run: Any) -> None:
    with ProfilingContext([MlflowSink(client, run)]) as profiling, profiling.step(0):
        profiling.record(Instrument("nan", "gauge"), math.nan)
        profiling.record(Instrument("infinite", "gauge"), math.inf)
        profiling.record(Instrument("one", "gauge"), 1)
    [(_, nan)], [(_, infinite)] = points(client, run, "nan"), points(client, run, "infinite")
    assert math.isnan(nan)
    assert infinite >= sys.float_info.max  # MLflow's databases know no larger number
    assert points(client, run, "one") == [(0, 1)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgen.request.e2e.p50", "vgen.request.e2e.p50"),
        ("train/loss: a-b c", "train/loss: a-b c"),
        ("reward[0]%", "reward_0__"),
        ("/abs//x/", "abs/x"),
        ("a/../../b", "b"),
        ("..", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_are_changed_only_where_mlflow_refuses_them(name: str, expected: str) -> None:
    from mlflow.utils import validation

    assert metric_name(name) == expected
    validation._validate_metric_name(metric_name(name))
    if name != expected and len(name) <= 250:
        with pytest.raises(Exception, match="name"):
            validation._validate_metric_name(name)


def test_odd_names_arrive_among_the_others(client: Any, run: Any) -> None:
    with ProfilingContext([MlflowSink(client, run)]) as profiling, profiling.step(0):
        profiling.record(Instrument("reward[0]", "gauge"), 2)
        profiling.record(Instrument("plain", "gauge"), 3)
    assert points(client, run, "reward_0_") + points(client, run, "plain") == [(0, 2), (0, 3)]


@pytest.mark.fault(
    point="W&B, MLflow and Trackio",
    did="MLflow's server refuses",
    happens="The loss is counted; the work goes on",
    within=60,
)
def test_a_server_that_refuses_is_a_counted_loss_and_no_failure_of_the_work(client: Any, waits: Any) -> None:
    profiling = ProfilingContext([MlflowSink(client, "0" * 32)])
    for n in range(3):
        with profiling.step(n):
            pass
    profiling.close()
    assert sum(waits) < 2.01
    assert profiling.dropped() == {"MlflowSink": 3}


def test_without_mlflow_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    with pytest.raises(MissingExtraError, match=r"MlflowSink needs MLflow: pip install 'vgen\[mlflow\]'"):
        MlflowSink(None, "id")
