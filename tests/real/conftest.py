"""Fixtures: one real `vgen serve` and one `vgen demo` for the whole session."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import demos


@dataclass
class Served:
    """A server with a tiny model, and everything that is needed to talk to it."""

    base_url: str
    control_key: str
    api_key: str
    folder: str
    """The model's directory, which is also its name."""
    model: Any
    """The trainer's copy. The server has these weights too, until one of them is changed."""
    tokenizer: Any
    process: subprocess.Popen[str]
    """The `vgen serve` command."""
    described: dict[str, Any]
    """The JSON object that the command printed."""
    collector: Any
    """Receives the server's own spans."""

    def call(self, path: str, body: Any = None, *, method: str = "", headers: dict[str, str] | None = None):
        """Send a request with both keys; returns status and JSON. A header given as None is not sent."""
        sent = {"Authorization": f"Bearer {self.api_key}", "X-Vgen-Control-Key": self.control_key} | (headers or {})
        request = urllib.request.Request(
            self.base_url + path,
            method=method or ("GET" if body is None else "POST"),
            data=None if body is None else json.dumps(body).encode(),
            headers={name: value for name, value in sent.items() if value is not None}
            | {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _json(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _json(error.read())

    def done(self, path: str, body: Any = None, **kwargs: Any) -> Any:
        """Send a request that must succeed; returns its JSON."""
        status, answer = self.call(path, body, **kwargs)
        assert status == 200, (path, status, answer)
        return answer

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")


class Starting:
    """The server's process. It starts with the session, so that it is nearly ready when the first test needs it."""

    def __init__(self) -> None:
        from helpers.collectors import HttpCollector

        from vgen.testing import tiny_model

        self.folder = tempfile.TemporaryDirectory(prefix="vgen-tests-")
        place = self.place = Path(self.folder.name)
        self.model, self.tokenizer = tiny_model(place / "model")
        self.api_key = secrets.token_hex(8)
        (place / "api-key").write_text(self.api_key + "\n")
        self.collector = HttpCollector()
        traces = f"{self.collector.endpoint}/v1/traces"
        command = [sys.executable, "-m", "vgen.cli", "serve", str(place / "model"), "--port", "0", "--json"]
        command += ["--api-key-file", str(place / "api-key"), "--otlp-traces-endpoint", traces]
        command += ["--max-model-len", "512", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)]
        command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "2"]
        command += ["--max-logprobs", "20", "--scheduling-policy", "priority"]
        with (place / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "OTEL_BSP_SCHEDULE_DELAY": "200"},
            )


STARTING = pytest.StashKey[Starting]()


def started(session: pytest.Session) -> Starting:
    if STARTING not in session.stash:
        session.stash[STARTING] = Starting()
    return session.stash[STARTING]


def pytest_collection_finish(session: pytest.Session) -> None:
    here = [item for item in session.items if item.path.parent == Path(__file__).parent]
    if any("server" in getattr(item, "fixturenames", ()) for item in here) and not session.config.option.collectonly:
        started(session)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (starting := session.stash.get(STARTING, None)) is not None:
        if starting.process.poll() is None:  # no test has used it
            starting.process.terminate()
            starting.process.wait(60)
        starting.folder.cleanup()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Served]:
    starting = started(request.session)
    place, process, api_key = starting.place, starting.process, starting.api_key
    model, tokenizer, collector = starting.model, starting.tokenizer, starting.collector
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (place / "stderr").read_text()[-3000:]
    described = json.loads(line)
    control_key = Path(described["control_key_file"]).read_text()
    served = Served(
        described["url"],
        control_key,
        api_key,
        str(place / "model"),
        model,
        tokenizer,
        process,
        described,
        collector,
    )
    yield served
    # SIGTERM ends the server and its workers, and leaves neither processes nor files.
    processes = served.processes()
    assert len(processes) >= 2, processes
    process.send_signal(signal.SIGTERM)
    status = process.wait(60)
    collector.close()
    assert status == 0, (place / "stderr").read_text()[-3000:]
    assert [found for found in processes if found.is_running() and found.status() != psutil.STATUS_ZOMBIE] == []
    assert not Path(described["control_key_file"]).parent.exists()


@pytest.fixture(scope="session", autouse=True)
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[demos.Started | None]:
    """Start the demo before the first test of this folder, if any test needs it."""
    if not any("recorded_demo" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    started = demos.Started.in_folder(tmp_path_factory.mktemp("demo"))
    yield started
    started.process.kill()
    started.process.wait()
