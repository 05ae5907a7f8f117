"""The examples of `docs/sinks.md` run as they are, and each backend then has what the page promises."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.scraper import needs_promtool

pytestmark = pytest.mark.slow
"""Half a minute, most of it for importing other libraries."""

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "sinks.md"
PORT = "9464"
"""The port of the page's Prometheus example. The test replaces it by a free one."""


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The page's code blocks in this language, each with the number of the line before it."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The page's examples, run one after another in one process and one folder."""
    from helpers.collectors import HttpCollector

    folder, collector = tmp_path_factory.mktemp("docs"), HttpCollector()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "WANDB_", "MLFLOW_"))}
    env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    env |= {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    yield SimpleNamespace(folder=folder, collector=collector, out=done.stdout, scraped=folder / "scraped.txt")
    collector.close()


def test_the_pages_command_shows_the_recorded_run(shown: Any):
    drawn = subprocess.run(
        [sys.executable, "-m", "vgen.cli", "trace", "runs/a", "--step", "1"],
        cwd=shown.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "rollout" in drawn.stdout


def test_spans_and_metrics_reach_the_collector(shown: Any):
    names = [span.name for span in shown.collector.spans]
    assert names.count("train.step") == names.count("rollout") == names.count("reward") == 3
    assert shown.collector.metric("reward").histogram.data_points[0].count == 9
    assert {found["service.name"] for found in shown.collector.resources} == {"grpo"}


def test_prometheus_can_scrape_the_port_of_its_example(shown: Any):
    text = shown.scraped.read_text()
    assert "reward_count 9.0" in text
    assert "rollout_duration_seconds_count 3.0" in text
    assert "otel_scope" not in text


@needs_promtool
def test_prometheus_accepts_its_configuration(tmp_path: Path):
    [(_, config)] = blocks(PAGE, "yaml")
    assert f"localhost:{PORT}" in config
    (tmp_path / "prometheus.yml").write_text(config)
    subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yml"], check=True, capture_output=True)


def test_both_ways_to_wandb_keep_every_row(shown: Any):
    from helpers import wandb_runs

    runs = sorted((shown.folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    kinds = [wandb_runs.rows(SimpleNamespace(dir=str(run / "files"))) for run in runs]
    [merged] = [rows for rows in kinds if any("rollout.duration.p99" in row for row in rows)]
    [beside] = [rows for rows in kinds if any("vgen/steps" in row for row in rows)]
    assert [row["loss"] for row in merged if "rollout.duration.p99" in row] == [0.5] * 3
    assert [row["loss"] for row in beside if "loss" in row] == [1.0, 1 / 2, 1 / 3]
    assert sum(row.get("vgen/reward.count", 0) for row in beside) == 9


def test_mlflow_has_the_trainers_numbers_and_vgens(shown: Any):
    with sqlite3.connect(shown.folder / "mlflow.db") as database:
        found = database.execute("SELECT key, step FROM metrics").fetchall()
    for key in ("loss", "reward.p50", "train.step.duration.sum"):
        assert sorted(step for name, step in found if name == key) == [0, 1, 2]


def test_trackio_has_the_trainers_numbers_and_vgens(shown: Any):
    with sqlite3.connect(shown.folder / "trackio" / "grpo.db") as database:
        found = [(step, json.loads(row)) for step, row in database.execute("SELECT step, metrics FROM metrics")]
    for key in ("loss", "reward.p50"):
        assert sorted(step for step, row in found if key in row) == [0, 1, 2]


def test_pytorchs_profiler_has_the_spans(shown: Any):
    trace = json.loads((shown.folder / "trace.json").read_text())
    assert [event.get("name") for event in trace["traceEvents"]].count("rollout") == 3


def test_the_users_own_sink_and_merged_ranks(shown: Any):
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines if re.fullmatch(r"[012] 0\.0\d+", line)] == ["0", "1", "2"]
    [merged] = [float(line) for line in lines if re.fullmatch(r"0\.2\d+", line)]
    assert 0.24 < merged < 0.26


def run_the_page() -> None:
    """Run all examples in one namespace; errors have the page's line numbers. The test starts a process for this."""
    with socket.create_server(("", 0)) as probe:
        port = str(probe.getsockname()[1])
    namespace: dict[str, Any] = {"__name__": "docs"}
    for line, code in blocks(PAGE, "python"):
        exec(compile("\n" * line + code.replace(PORT, port), str(PAGE), "exec"), namespace)
        if "start_http_server" in code:
            with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=5) as answer:
                Path("scraped.txt").write_bytes(answer.read())
            namespace["server"].shutdown()


if __name__ == "__main__":
    run_the_page()
