"""`ServerProcess`: a running vLLM server, its log, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.request
import weakref
from contextlib import suppress
from dataclasses import InitVar, dataclass
from pathlib import Path

from ...errors import EngineError
from ..server_api import CONTROL_HEADER, INFO

KEY_FILE = "control-key"
"""Name of the file with the control key, in the server's temporary folder."""
POLL_SECONDS = 0.2
STOP_SECONDS = 30.0
LAST_LINES = 15
"""How many lines of the log an error repeats."""
_ERROR = re.compile(r"([\w.]+(Error|Exception)|[\w.]+: error): \S")
_LOG_PREFIX = re.compile(r"^\(\w+ pid=\d+\)\s*((ERROR|WARNING|INFO) [\d-]+ [\d:]+ \[[^\]]*\]\s?)?")


@dataclass(eq=False, repr=False)  # a representation would show the key
class ServerProcess:
    """A vLLM server that `start_server` started. It ends with this process, or with the block as a context manager."""

    process: subprocess.Popen[bytes]
    model: str
    url: str
    control_key: str
    """Permits all routes except inference, in the header `X-Vgen-Control-Key`."""
    log_file: Path
    folder: InitVar[tempfile.TemporaryDirectory[str]]
    """Is deleted when the server ends."""

    def __post_init__(self, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.control_key_file = Path(folder.name, KEY_FILE)
        """A file with the control key that only this user can read. It is deleted when the server ends."""
        self._end = weakref.finalize(self, _end, self.process, folder, os.getpid())

    def wait_until_healthy(self, timeout: float) -> None:
        """Wait until the server accepts requests. Raises `EngineError`, with the end of the log, if it does not."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            with suppress(OSError, ValueError):
                _get(f"{self.url}/health", {})
                # Only this server knows its key. Another process may have opened the port before it.
                if "vgen" in json.loads(_get(f"{self.url}{INFO}", {CONTROL_HEADER: self.control_key})):
                    return
            if time.monotonic() > deadline:
                raise EngineError(f"vLLM was not ready to serve {self.model} within {timeout:g} s{self._log_end()}")
            time.sleep(POLL_SECONDS)
        raise self.death("before it was ready")

    def death(self, when: str) -> EngineError:
        """The error for a server that has ended by itself, with the cause from its log."""
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return EngineError(f"vLLM {how} {when}, serving {self.model}: {self._cause()}{self._log_end()}")

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End the server and all its processes. Those that still run after `timeout` seconds are killed."""
        if finalizer := self._end.detach():
            _end(*finalizer[2], timeout=timeout)

    def _cause(self) -> str:
        """The last error in the log, which holds the tracebacks of several processes. vLLM repeats errors upwards."""
        lines = [_LOG_PREFIX.sub("", line).strip() for line in self._log_lines()]
        errors = [line for line in lines if _ERROR.match(line)]
        causes = [error for error in errors if "See root cause above" not in error]
        return (causes or errors or ["the log has no error"])[-1]

    def _log_end(self) -> str:
        return "\n".join(["; its log ends with:", *self._log_lines()[-LAST_LINES:]])

    def _log_lines(self) -> list[str]:
        with suppress(OSError):
            return self.log_file.read_text(errors="replace").splitlines()
        return []

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _get(url: str, headers: dict[str, str]) -> bytes:
    # Past any HTTP proxy. The certificate may name another host than the one that is used here.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=5.0) as answer:
        return answer.read()


def _end(
    process: subprocess.Popen[bytes],
    folder: tempfile.TemporaryDirectory[str],
    owner: int,
    *,
    timeout: float = STOP_SECONDS,
) -> None:
    if os.getpid() != owner:  # a forked child runs the finalizer, too
        return
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
            _wait_until_gone(process.pid, 5.0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        folder.cleanup()


def _wait_until_gone(group: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
