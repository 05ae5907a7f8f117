"""A vLLM server as anybody starts it, for tests of clients against a server without vgen's plugin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .._addresses import free_port

POLL_SECONDS, STOP_SECONDS, LOG_CHARACTERS = 0.5, 20, 3000


@contextmanager
def stock_server(
    model: str | Path,
    *,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = 240.0,
) -> Generator[str]:
    """Run `vllm serve` in development mode and without vgen's plugin; yields its URL once it is healthy.

        with stock_server(tmp_path / "model", arguments=["--max-model-len", "512"]) as url:
            generation = ServerGeneration(model, base_urls=[url])

    `arguments` are vLLM's. `environment` is added to this process's. The server and its workers end with the block.
    Raises `RuntimeError`, with the end of the server's log, if it exits or is not healthy within `timeout` seconds.
    """
    port = free_port("127.0.0.1")
    # The CPU build has no `vllm` command; this module is what the command runs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    variables = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "", **(environment or {})}
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + timeout
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        try:
            while not _healthy(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"vLLM did not become healthy; its log ends: {log.read()[-LOG_CHARACTERS:]}")
                time.sleep(POLL_SECONDS)
            yield url
        finally:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # workers that the server left behind, too
            server.wait()


def _healthy(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
        return True
    return False
