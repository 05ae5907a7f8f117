"""Every query of the dashboard and every key of the W&B workspace, with data from runs of the real engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers import wandb_runs
from helpers.changed_source import ChangedSource
from helpers.expressions import EVERY_EXPRESSION, OF_THE_PAGE, filled
from helpers.scraper import needs_prometheus, scraping, wait_for
from helpers.workspace_keys import keys
from prometheus_client import CollectorRegistry, start_http_server

from vgen import ColocateGeneration, ProfilingContext, Sampling, ServerConnection, ServerGeneration, WeightSyncError
from vgen.dashboards import vllm
from vgen.dashboards.alerts import rules
from vgen.dashboards.promql import series
from vgen.dashboards.wandb import workspace
from vgen.profiling import Sink, semconv
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.prometheus import prometheus_provider
from vgen.profiling.sinks.wandb import WandbSink
from vgen.testing import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_prometheus]

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PROMPTS = [*("once upon a time", "the quick brown fox") * 4, list(range(100))]


class Dead(Sink):
    """A backend that is down: it loses its records."""

    inline = False

    def on_end(self, span: Any) -> None:
        raise ConnectionError


def k_proj_cut(name: str, tensor: Any) -> list[tuple[str, Any]]:
    return [(name, tensor[1:] if "k_proj" in name else tensor)]


def use(generation: Any) -> None:
    """The calls that one training step makes."""
    generation.generate(PROMPTS, Sampling(temperature=1.0, max_tokens=24, stop_token_ids=list(range(40, 60))), 4)
    if isinstance(generation, ColocateGeneration):
        generation.sleep(level=2)
        generation.wake_up()
    generation.sync_weights()


def fail_once(generation: Any, source: ChangedSource) -> None:
    with source.changed_by(k_proj_cut), pytest.raises(WeightSyncError):
        generation.sync_weights()
    generation.sync_weights()


def replay_a_gpu(profiling: ProfilingContext) -> None:
    """Record what only a GPU has, from an earlier run on one: device time of syncs, and memory freed by sleep."""
    models = json.loads((RESULTS / "weight_sync-h200.json").read_text())["models"]
    for model in models:
        profiling.record(
            semconv.DEVICE_TIME, model["ways"]["recorded"]["seconds"], **{semconv.TIMED_SPAN: semconv.WEIGHT_SYNC}
        )
    freed = [found["freed_bytes"] for found in json.loads((RESULTS / "demo-h200.json").read_text())["steps"]]
    for bytes in freed:
        profiling.record(semconv.SLEEP_FREED, bytes, **{semconv.SLEEP_LEVEL: 2})
        profiling.record(semconv.WAKE_TAKEN, bytes)
        profiling.record(semconv.MEMORY_USED, bytes)  # at least as much was in use before
        profiling.record(semconv.LEAKED_TOTAL, max(freed[0] - bytes, 0), **{semconv.SLEEP_LEVEL: 2})


def replay_a_fault(profiling: ProfilingContext) -> None:
    """Record what right engines do not do."""
    profiling.record(semconv.NAN_LOGPROBS, 1, **{semconv.ENGINE: "colocate"})


SENT = series(semconv.REQUEST_E2E, ('vgen_engine_kind="server"',), part="count")
ARRIVED = series(vllm.E2E, (), part="count")


@pytest.fixture(scope="module")
def watched(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Three steps with an engine in this process and one behind a server, while Prometheus scrapes both."""
    folder = tmp_path_factory.mktemp("watched")
    model, tokenizer = tiny_model(folder / "model")
    registry, run = CollectorRegistry(), wandb_runs.start(folder)
    metrics, _ = start_http_server(0, "127.0.0.1", registry)
    sinks = [
        OTelSink(meter_provider=prometheus_provider(registry, service_name="grpo", rank=0)),
        WandbSink(run, commit=True),
        Dead(),
    ]
    access = {"api_key": server.api_key, "control_key": server.control_key, "processing_class": server.tokenizer}
    access["connection"] = ServerConnection(timeout=120.0)
    targets = {"vgen": f"127.0.0.1:{metrics.server_port}", "vllm": urlsplit(server.base_url).netloc}
    with (
        scraping(folder, every="1s", rules=rules(), **targets) as address,
        ProfilingContext(sinks) as profiling,
        ColocateGeneration(
            model,
            processing_class=tokenizer,
            enable_sleep_mode=True,
            max_model_length=512,
            drift_every=1,
            stall_seconds=0.05,  # the first call of an engine on a CPU is a stall
            profiling=profiling,
        ) as here,
        ServerGeneration(
            source := ChangedSource(server.model),
            base_urls=[server.base_url],
            profiling=profiling,
            **access,
        ) as there,
    ):
        before = number(wait_for(address, ARRIVED))
        for step in range(3):
            with profiling.step(step):
                use(here)
                use(there)
                if step == 1:
                    fail_once(there, source)
                replay_a_gpu(profiling)
                replay_a_fault(profiling)
            profiling.flush(10.0)
            # Prometheus computes rates from samples before and after each step.
            done = series(semconv.duration(semconv.STEP), (), part="count")
            wait_for(address, f"{done} == {step + 1} and on () {series(semconv.DROPPED, ())} > 0")
        run.finish()
        yield SimpleNamespace(address=address, before=before, rows=wandb_runs.rows(run))
    metrics.shutdown()


def number(found: list[dict[str, Any]]) -> float:
    """The value of the only series in the answer."""
    [answer] = found
    return float(answer["value"][1])


@pytest.mark.parametrize("expression", [*EVERY_EXPRESSION, *OF_THE_PAGE])
def test_each_query_has_an_answer_in_numbers(watched: Any, expression: str):
    found = wait_for(watched.address, filled(expression, job="vgen"))
    values = [float(answer["value"][1]) for answer in found]
    assert any(math.isfinite(value) for value in values), found


def test_the_answers_are_the_figures_of_the_run(watched: Any):
    """The right numbers: one failed sync and two engines that are awake."""
    failed = series(
        semconv.duration(semconv.WEIGHT_SYNC), ('vgen_engine_kind="server"', 'error_type!=""'), part="count"
    )
    assert number(wait_for(watched.address, failed)) == 1
    states = wait_for(watched.address, series(semconv.ENGINE_STATE, ()))
    assert {semconv.STATES[int(float(state["value"][1]))] for state in states} == {"awake"}
    assert {state["metric"]["vgen_engine_kind"] for state in states} == {"colocate", "server"}


def test_only_the_alerts_of_what_happened_fire(watched: Any):
    """A sync failed and a backend was down. No engine stayed failed, and no memory leaked."""
    firing = wait_for(watched.address, 'ALERTS{alertstate="firing"}')
    assert {alert["metric"]["alertname"] for alert in firing} == {"VgenWeightSyncFailed", "VgenTelemetryDropped"}


def test_vllm_counts_the_same_requests(watched: Any):
    sent = number(wait_for(watched.address, SENT))
    assert sent == 3 * len(PROMPTS) * 4
    assert number(wait_for(watched.address, ARRIVED)) - watched.before >= sent  # more: requests that verify a sync


def test_each_key_of_the_workspace_is_in_the_runs_history(watched: Any):
    written = {key.removesuffix("._type") for row in watched.rows for key in row}
    assert keys(workspace("team", "grpo")) <= written
