"""`ServerProcess`: a running vLLM server, its log, and its end."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
import weakref
from contextlib import closing, suppress
from dataclasses import InitVar, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import EngineError
from ..server_api import INSTANCE
from .server_folder import ServerFolder

KEY_FILE = "control-key"
"""Name of the file with the control key, in the server's temporary folder."""
INSTANCE_VARIABLE = "VGEN_INSTANCE"
"""The environment variable of a server that holds its instance ID, which its launcher has chosen."""
POLL_SECONDS = 0.2
ANSWER_SECONDS = 5.0
HANG_UP_SECONDS = 2.0
"""A server that has hung up, and runs on for so long, has refused the connection."""
STOP_SECONDS = 30.0
LAST_LINES = 15
"""How many lines of the log an error repeats."""
_ERROR = re.compile(r"([\w.]+(Error|Exception)|[\w.]+: error): \S")
_CAUSE_IS_ABOVE = ("See root cause above", "stack trace (above)", "stack trace above")
"""What vLLM writes of an error that it has logged already."""
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST")
"""OpenSSL's reasons for an answer that is not TLS."""
_TLS_REFUSED = (
    "the server refuses its own certificate, with which the launcher asks it whether it is healthy: with "
    "--ssl-cert-reqs 2, --ssl-ca-certs must hold the authority that has signed --ssl-certfile, and that must be a "
    "certificate for clients as well"
)
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
    folder: InitVar[ServerFolder]
    """Is deleted when the server ends."""
    instance: str = ""
    """What this server answers on `/vgen/instance`, and no other process can: the launcher has drawn it at random."""
    tls: ssl.SSLContext | None = None
    """Trusts this server's certificate and no other."""

    def __post_init__(self, folder: ServerFolder) -> None:
        self.control_key_file = Path(folder.name, KEY_FILE)
        """A file with the control key that only this user can read. It is deleted when the server ends."""
        self._end = weakref.finalize(self, _end, self.process, folder, os.getpid())

    def wait_until_healthy(self, timeout: float) -> None:
        """Wait until the server accepts requests. Raises `EngineError`, with the end of the log, if it does not.

        Raises `EngineError` at once if another process answers at the port. No key is sent.
        """
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            with suppress(OSError):  # it does not listen yet, or is busy
                if self._healthy():
                    return
            if time.monotonic() > deadline:
                raise EngineError(f"vLLM was not ready to serve {self.model} within {timeout:g} s{self._log_end()}")
            time.sleep(POLL_SECONDS)
        raise self.death("before it was ready")

    def _healthy(self) -> bool:
        """Whether the server is healthy. Raises `EngineError` if another process listens at its port."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        if self.tls is None:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=ANSWER_SECONDS)
        else:
            connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=ANSWER_SECONDS, context=self.tls
            )
        with closing(connection):
            try:
                connection.connect()
                if self.tls is not None and _is_hung_up(connection.sock):
                    raise ssl.SSLEOFError(0, "it has hung up")
                _, raw = _get(connection, INSTANCE)
                if json.loads(raw)["instance"] != self.instance:
                    raise self._foreign("it is another server of vgen's")
                return _get(connection, "/health")[0] == 200
            except http.client.RemoteDisconnected:  # it is about to end
                raise
            except ssl.SSLCertVerificationError as error:
                problem = f"its certificate is not the one in --ssl-certfile ({error.verify_message})"
                raise self._foreign(problem) from error
            except ssl.SSLError as error:
                if getattr(error, "reason", "") in _NO_TLS:
                    raise self._foreign("it does not speak TLS") from error
                if isinstance(error, ssl.SSLEOFError) and self._runs_on():
                    raise EngineError(f"{_TLS_REFUSED}{self._log_end()}") from error
                raise
            except (http.client.HTTPException, ValueError, TypeError, LookupError, RecursionError) as error:
                raise self._foreign("it is no server of vgen's") from error

    def _runs_on(self) -> bool:
        """Whether the server is not just about to end."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(HANG_UP_SECONDS)
        return self.process.poll() is None

    def _foreign(self, problem: str) -> EngineError:
        port = urlsplit(self.url).port
        message = f"another process answers on port {port}, at {self.url}: {problem}; choose another port"
        return EngineError(f"{message}{self._log_end()}")

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
        causes = [error for error in errors if not any(words in error for words in _CAUSE_IS_ABOVE)]
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


def trusting(certificate: str | Path, key: str | Path | None = None, *, shown: bool = False) -> ssl.SSLContext:
    """A TLS context that trusts a server with the certificate in this file, and nobody else.

    With `shown` it shows the same certificate, whose key is in the other file or in the same. Raises `EngineError` if
    the files do not hold a certificate, or its key.
    """
    # The file is what the server was given to show: its own certificate, then perhaps those of the authorities that
    # signed it. Only the first is trusted. Otherwise all that a public authority has signed would do.
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    try:
        text = Path(certificate).read_text(encoding="ascii", errors="ignore")
        own = text[text.index(begin) : text.index(end) + len(end)]
        context = ssl.create_default_context(cadata=own)  # with `cadata` it does not load the system's authorities
    except (OSError, ValueError) as error:
        raise EngineError(f"--ssl-certfile {certificate} holds no certificate that Python can read: {error}") from error
    if shown:
        try:
            context.load_cert_chain(certificate, key)
        except OSError as error:
            raise EngineError(f"--ssl-keyfile {key} holds no key of {certificate} for Python: {error}") from error
    # The certificate may name a public host, and the launcher connects by a local address. As only one certificate is
    # trusted, the name would add nothing.
    context.check_hostname = False
    # Self-signed certificates often lack the extensions that the strict mode (Python 3.13's default) asks for, and one
    # that an authority has signed is trusted without that authority.
    context.verify_flags = (context.verify_flags & ~ssl.VERIFY_X509_STRICT) | ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _is_hung_up(connection: socket.socket) -> bool:
    """Whether the server closes a new connection. It does so when it refuses the client's certificate.

    In TLS 1.3 that comes after the handshake. A request that is under way by then would be answered by a mere reset.
    """
    connection.settimeout(POLL_SECONDS)
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    finally:
        connection.settimeout(ANSWER_SECONDS)


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    """The status and the first part of the answer's body. Follows no redirect, and goes past any HTTP proxy."""
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read(1 << 16)


def _end(
    process: subprocess.Popen[bytes],
    folder: ServerFolder,
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
