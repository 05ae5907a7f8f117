"""Every query of the dashboard and every key of the W&B workspace, asked of runs of the real engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import wandb_runs
from expressions import EVERY_EXPRESSION, OF_THE_PAGE, filled
from prometheus_client import CollectorRegistry, start_http_server
from scraper import eventually, needs_prometheus, scraping

from vgen import ColocateGeneration, ProfilingContext, Sampling, ServerGeneration, WeightSyncError
from vgen.dashboards import vllm
from vgen.dashboards.alerts import rules
from vgen.dashboards.promql import series
from vgen.dashboards.wandb import keys, workspace
from vgen.profiling import Sink, names
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.prometheus import prometheus_provider
from vgen.profiling.sinks.wandb import WandbSink
from vgen.testing import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_prometheus]

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PROMPTS = [*("once upon a time", "the quick brown fox") * 4, list(range(100))]


class Dead(Sink):
    """A backend that is gone: its records are lost."""

    inline = False

    def on_end(self, span: Any) -> None:
        raise ConnectionError


class Broken:
    """A source whose last tensors are wrong."""

    bytes = tensors = 0
    seconds = 0.0

    def __init__(self, source: Any) -> None:
        self._source = source

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name, tensor in self._source:
            yield name, tensor[1:] if "k_proj" in name else tensor


def use(generation: Any) -> None:
    """One training step's part of the engine's."""
    generation.generate(PROMPTS, Sampling(temperature=1.0, max_tokens=24, stop_token_ids=list(range(40, 60))), 4)
    if isinstance(generation, ColocateGeneration):
        generation.sleep(level=2)
        generation.wake_up()
    generation.sync_weights()


def fail_once(generation: Any) -> None:
    source, generation._source = generation._source, Broken(generation._source)
    with pytest.raises(WeightSyncError):
        generation.sync_weights()
    generation._source = source
    generation.sync_weights()


def replay_a_gpu(profiling: ProfilingContext) -> None:
    """What a CPU has none of, as it was on a GPU: device seconds of syncs, and what sleeping gave back."""
    models = json.loads((RESULTS / "weight_sync-h200.json").read_text())["models"]
    for model in models:
        profiling.record(
            names.DEVICE_TIME, model["ways"]["recorded"]["seconds"], **{names.TIMED_SPAN: names.WEIGHT_SYNC}
        )
    freed = [found["freed_bytes"] for found in json.loads((RESULTS / "demo-h200.json").read_text())["steps"]]
    for bytes in freed:
        profiling.record(names.SLEEP_FREED, bytes, **{names.SLEEP_LEVEL: 2})
        profiling.record(names.WAKE_TAKEN, bytes)
        profiling.record(names.MEMORY_USED, bytes)  # as much was in use before, at least
        profiling.record(names.LEAKED_TOTAL, max(freed[0] - bytes, 0), **{names.SLEEP_LEVEL: 2})


SENT = series(names.REQUEST_E2E, ('vgen_engine="server"',), part="count")
ARRIVED = series(vllm.E2E, (), part="count")


@pytest.fixture(scope="module")
def watched(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Three steps of an engine in this process and of one behind a server, under a Prometheus that scrapes both."""
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
    targets = {"vgen": f"127.0.0.1:{metrics.server_port}", "vllm": urlsplit(server.base_url).netloc}
    with (
        scraping(folder, every="1s", rules=rules(), **targets) as address,
        ProfilingContext(sinks) as profiling,
        ColocateGeneration(
            model,
            processing_class=tokenizer,
            enable_sleep_mode=True,
            max_model_length=512,
            stall_seconds=0.05,  # the first call of an engine on a CPU is a stall
            profiling=profiling,
        ) as here,
        ServerGeneration(
            server.model, base_urls=[server.base_url], timeout=120.0, profiling=profiling, **access
        ) as there,
    ):
        before = number(eventually(address, ARRIVED))
        for step in range(3):
            with profiling.step(step):
                use(here)
                use(there)
                if step == 1:
                    fail_once(there)
                replay_a_gpu(profiling)
            profiling.flush(10.0)
            # rates need what was before and after
            done = series(names.duration(names.STEP), (), part="count")
            eventually(address, f"{done} == {step + 1} and on () {series(names.DROPPED, ())} > 0")
        run.finish()
        yield SimpleNamespace(address=address, before=before, rows=wandb_runs.rows(run))
    metrics.shutdown()


def number(found: list[dict[str, Any]]) -> float:
    """The value of the one series that was found."""
    [answer] = found
    return float(answer["value"][1])


@pytest.mark.parametrize("expression", [*EVERY_EXPRESSION, *OF_THE_PAGE])
def test_each_query_has_an_answer_in_numbers(watched: Any, expression: str):
    found = eventually(watched.address, filled(expression, job="vgen"))
    values = [float(answer["value"][1]) for answer in found]
    assert any(math.isfinite(value) for value in values), found


def test_the_answers_are_the_runs_own(watched: Any):
    """Not merely some numbers: one sync that failed, two engines that are awake."""
    failed = series(names.duration(names.WEIGHT_SYNC), ('vgen_engine="server"', 'error_type!=""'), part="count")
    assert number(eventually(watched.address, failed)) == 1
    states = eventually(watched.address, series(names.ENGINE_STATE, ()))
    assert {names.STATES[int(float(state["value"][1]))] for state in states} == {"awake"}
    assert {state["metric"]["vgen_engine"] for state in states} == {"colocate", "server"}


def test_the_alerts_are_those_of_what_happened(watched: Any):
    """A sync failed, a backend was dead; no engine stays failed, and nothing has leaked."""
    firing = eventually(watched.address, 'ALERTS{alertstate="firing"}')
    assert {alert["metric"]["alertname"] for alert in firing} == {"VgenWeightSyncFailed", "VgenTelemetryDropped"}


def test_vllm_counts_the_same_requests(watched: Any):
    sent = number(eventually(watched.address, SENT))
    assert sent == 3 * len(PROMPTS) * 4
    assert number(eventually(watched.address, ARRIVED)) - watched.before >= sent  # and those that verify a sync


def test_each_key_of_the_workspace_is_in_the_runs_history(watched: Any):
    written = {key.removesuffix("._type") for row in watched.rows for key in row}
    assert keys(workspace("team", "grpo")) <= written
