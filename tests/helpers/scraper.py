"""A real Prometheus server, and queries to it."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from helpers.waiting import wait_until

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no Prometheus here: apt-get install prometheus"
)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here: apt-get install prometheus"
)


@contextmanager
def scraping(folder: Path, every: str = "200ms", rules: Any = None, **jobs: str) -> Iterator[str]:
    """Start a Prometheus that scrapes each job's target (`host:port`); yields its address.

    `rules` is the content of a rule file. A target has no series until it answers within `every`.
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
    """Return the series that match the expression now."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)["data"]["result"]


def wait_for(address: str, expression: str) -> list[dict[str, Any]]:
    """Return the same as soon as there are any. Until then Prometheus may not accept connections yet."""

    def series() -> list[dict[str, Any]]:
        with suppress(urllib.error.URLError):
            return query(address, expression)
        return []

    return wait_until(series, 15, every=0.1)


def _listening(log: Path, server: subprocess.Popen[Any]) -> str:
    def address() -> str:
        if server.poll() is not None:
            raise RuntimeError(log.read_text())
        lines = [line for line in log.read_text().splitlines() if "Listening on" in line]
        return json.loads(lines[0])["address"] if lines else ""

    return wait_until(address, 20, every=0.05)
