"""`vgen serve`: runs a server in the foreground of a terminal or a container."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ...errors import EngineError, MissingExtraError
from .launcher import start_server
from .server_process import ServerProcess

FOLLOW_SECONDS = 0.2
UNREAD_SECONDS = 2.0
"""How long the end waits for somebody to read standard error."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(
    model: str,
    *,
    as_json: bool = False,
    quiet: bool = False,
    startup_timeout: float = 600.0,
    arguments: Sequence[str] = (),
    **settings: Any,
) -> int:
    """Serve `model` until SIGTERM (status 0), Ctrl-C (130), or the server's own end (1). Returns the exit status.

    The server's log goes to standard error. Standard output gets the URL, or one JSON object, once it is healthy.

    Args:
        model: A directory or hub name.
        as_json: Print a JSON object (URL, model, PID, paths) instead of the URL.
        quiet: Do not repeat the server's log.
        startup_timeout: Seconds until the server must be healthy.
        arguments: Further options of vLLM.
        settings: Further arguments of `start_server`.
    """
    log = LogFollower()
    try:
        with _signals_raise(), start_server(model, arguments=arguments, wait=False, **settings) as server:
            if not quiet:
                log.follow(server.log_file)
            server.wait_until_healthy(startup_timeout)
            if as_json:
                print(json.dumps(_described(server)), flush=True)
            else:
                print(server.url, flush=True)
                log.say(f"the control key is in {server.control_key_file}")
            if settings.get("host") not in LOOPBACK and not settings.get("api_key"):
                log.say("anyone who reaches this port can generate: pass --api-key-file")
            server.process.wait()
            raise server.death("while it was serving")
    except _Signalled as signalled:
        (number,) = signalled.args
        return 0 if number == signal.SIGTERM else 128 + number
    except (EngineError, MissingExtraError, ValueError) as error:
        log.close()
        log.say(str(error))
        return 1
    finally:
        log.close()


def key(value: str | None, file: Path | None) -> str | None:
    """The key from the file, or else `value`. Other users can read a command line, but not the file."""
    return file.read_text().strip() if file is not None else value


def _described(server: ServerProcess) -> dict[str, Any]:
    files = {name: str(getattr(server, name)) for name in ("control_key_file", "log_file")}
    return {"url": server.url, "model": server.model, "pid": server.process.pid, **files}


class _Signalled(BaseException):
    """This process has received the signal whose number is the argument."""


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGINT raise `_Signalled` in the block. A second one, while the server stops, kills it at once."""

    def interrupt(number: int, _: object) -> None:
        raise _Signalled(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LogFollower:
    """Copies a growing file to standard error, in a thread.

    Standard error may be a pipe that nobody reads. Then what is left of the log is dropped at the end.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, path: Path) -> None:
        thread = threading.Thread(target=self._follow, args=(path.open("rb"),), daemon=True)
        thread.start()
        # Only now: a signal may interrupt `start`, and a thread that has not started cannot be joined.
        self._thread = thread

    def say(self, message: str) -> None:
        """Write a line of this command's own."""
        self._write(f"vgen serve: {message}\n".encode(errors="backslashreplace"), time.monotonic() + UNREAD_SECONDS)

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self, file: IO[bytes]) -> None:
        with file:
            ended = False
            while not ended:
                ended = self._ended.wait(FOLLOW_SECONDS)
                self._write(file.read())

    def _write(self, text: bytes, deadline: float | None = None) -> None:
        """Write to standard error until `deadline`, or for as long as it takes, and a little longer after the end."""
        with suppress(OSError):  # it is closed
            while text:
                if select.select([], [2], [], FOLLOW_SECONDS)[1]:
                    # A pipe that is ready takes so much at once. More of it would wait for a reader.
                    text = text[os.write(2, text[: select.PIPE_BUF]) :]
                elif deadline is None and self._ended.is_set():
                    deadline = time.monotonic() + UNREAD_SECONDS
                elif deadline is not None and time.monotonic() > deadline:
                    return
