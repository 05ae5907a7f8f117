"""A real Prometheus, and what it answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no Prometheus here: apt-get install prometheus"
)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here: apt-get install prometheus"
)


@contextmanager
def scraping(folder: Path, every: str = "200ms", rules: Any = None, **jobs: str) -> Iterator[str]:
    """The address of a Prometheus that scrapes each job's target, `host:port`.

    `rules` is the content of a rule file. A target that does not answer within `every` has no series until it does.
    """
    scrapes = [{"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in jobs.items()]
    config: dict[str, Any] = {"global": {"scrape_interval": every, "scrape_timeout": every}, "scrape_configs": scrapes}
    if rules is not None:
        (folder / "rules.yml").write_text(json.dumps(rules))
        config |= {"rule_files": ["rules.yml"]}
        config["global"]["evaluation_interval"] = every
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
                "--log.format=json",
            ],
            stderr=log,
        )
    try:
        yield f"http://{_listening(folder / 'log', server)}"
    finally:
        server.terminate()
        server.wait(10)


def query(address: str, expression: str) -> list[dict[str, Any]]:
    """The series that the expression gives now."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)["data"]["result"]


def eventually(address: str, expression: str) -> list[dict[str, Any]]:
    """The same, as soon as there are any."""
    deadline = time.monotonic() + 15
    while True:
        try:
            if found := query(address, expression):
                return found
        except urllib.error.URLError:
            pass
        assert time.monotonic() < deadline, f"Prometheus has nothing for {expression}"
        time.sleep(0.1)


def _listening(log: Path, server: subprocess.Popen[Any]) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        for line in log.read_text().splitlines():
            if "Listening on" in line:
                return json.loads(line)["address"]
        time.sleep(0.05)
    raise TimeoutError(log.read_text())
