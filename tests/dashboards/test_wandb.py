"""The W&B workspace: every key that it shows is one that the sink writes, read back from a real offline run."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import wandb_runs
from helpers.workspace_keys import keys

from vgen.cli import main
from vgen.dashboards.wandb import workspace
from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.wandb import STEP_METRIC, WandbSink


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The keys of a run in which everything that vgen records happened."""
    run = wandb_runs.start(tmp_path_factory.mktemp("wandb"))
    with ProfilingContext([WandbSink(run, commit=True)]) as profiling:
        for number in range(2):
            with profiling.step(number):
                for name in semconv.SPANS:
                    if name != semconv.STEP:
                        with profiling.span(name):
                            pass
                for instrument in semconv.METRICS.values():
                    profiling.record_many(instrument, [1.0, 2.0])
    run.finish()
    # a distribution is an object: its fields are what W&B's tool shows
    return {key.removesuffix("._type") for row in wandb_runs.rows(run) for key in row}


def test_every_key_of_the_workspace_is_written_by_the_sink(written: set[str]):
    shown = keys(workspace("team", "grpo"))
    assert STEP_METRIC in shown
    assert len(shown) > 20
    assert shown <= written, shown - written


def test_each_section_has_panels_over_the_trainers_steps():
    made = workspace("team", "grpo")
    assert [section.name for section in made.sections] == [
        "Time", "Rollouts", "Health",
    ]  # fmt: skip
    for section in made.sections:
        lines = [panel for panel in section.panels if hasattr(panel, "y")]
        assert lines
        assert {panel.x for panel in lines} == {STEP_METRIC}
        assert all(panel.y for panel in lines)


def test_making_it_asks_nobody(monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    assert workspace("team", "grpo")._spec["entity"] == "team"


@pytest.mark.parametrize("target", ["grpo", "team/", "/grpo", "a/b/c"])
def test_a_wrong_target_is_one_sentence(target: str, capsys: pytest.CaptureFixture[str]):
    assert main(["dashboards", "--wandb", target]) == 2
    assert capsys.readouterr().err == f"vgen dashboards: --wandb takes ENTITY/PROJECT, got {target}\n"


class WandbServer(http.server.ThreadingHTTPServer):
    """Takes what W&B's own client sends, and answers as their API does."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.views = refuses, list[dict[str, Any]]()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command, in a process of its own: W&B's client keeps who is logged in."""
        env = {**os.environ, "WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": "f" * 40}
        command = [sys.executable, "-m", "vgen.cli", "dashboards", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(body) if self.path == "/graphql" else {"query": ""}
        answer: dict[str, Any] = {"data": {"viewer": {"id": "1", "entity": "team", "username": "someone"}}}
        if "upsertView" in asked["query"]:
            self.server.views.append(asked["variables"])
            view = {"id": "1", "name": asked["variables"]["name"]}
            answer = {"data": {"upsertView": {"view": view, "inserted": True}}}
            if self.server.refuses:
                answer = {"errors": [{"message": "permission denied"}], "data": None}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_command_saves_it_as_a_new_view():
    with WandbServer() as server:
        done = server.run("--wandb", "team/grpo")
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"http://127.0.0.1:{server.server_port}/team/grpo?nw=")
    [view] = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "grpo", "vgen")
    assert "id" not in view  # no other view is overwritten
    assert set(re.findall(r'"(vgen/[^"]+)"', view["spec"])) == keys(workspace("team", "grpo"))


def test_a_refusal_is_one_sentence():
    with WandbServer(refuses=True) as server:
        done = server.run("--wandb", "team/grpo")
        server.shutdown()
    assert done.returncode == 1
    assert "vgen dashboards: W&B did not take the workspace: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "f" * 40 not in done.stderr


def test_the_folder_and_the_workspace_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["dashboards", str(tmp_path), "--wandb", "nobody"]) == 2
    assert (tmp_path / "compose.yaml").exists()
