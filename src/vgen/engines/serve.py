"""`vgen serve`: a server in the foreground of a terminal or a container."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import EngineError, MissingExtraError
from .launch import ServerProcess, start_server

FOLLOW_SECONDS = 0.2
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

    What the server says goes to standard error; standard output gets the URL, or one JSON object, once it is healthy.
    """
    log = _Log()
    try:
        with _signals_raise(), start_server(model, arguments=arguments, wait=False, **settings) as server:
            if not quiet:
                log.follow(server.log_file)
            server.wait_until_healthy(startup_timeout)
            if as_json:
                print(json.dumps(_described(server)), flush=True)
            else:
                print(server.url, flush=True)
                print(f"vgen serve: the control key is in {server.control_key_file}", file=sys.stderr)
            if settings.get("host") not in LOOPBACK and not settings.get("api_key"):
                print("vgen serve: whoever reaches this port may generate: give --api-key-file", file=sys.stderr)
            server.process.wait()
            raise server.death("while it served")
    except _Signalled as signalled:
        return 0 if signalled.number == signal.SIGTERM else 128 + signalled.number
    except (EngineError, MissingExtraError, ValueError) as error:
        log.close()
        print(f"vgen serve: {error}", file=sys.stderr)
        return 1
    finally:
        log.close()


def key(given: str | None, file: Path | None) -> str | None:
    """A key as it was given, or out of a file, which unlike a command line nobody else can read."""
    return file.read_text().strip() if file is not None else given


def _described(server: ServerProcess) -> dict[str, Any]:
    return {
        "url": server.url,
        "model": server.model,
        "pid": server.process.pid,
        "control_key_file": str(server.control_key_file),
        "log_file": str(server.log_file),
    }


class _Signalled(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGINT unwind what is under way; a second one, while the server is stopping, hurries it."""

    def interrupt(number: int, _: object) -> None:
        raise _Signalled(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log:
    """Repeats a growing file on standard error."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, path: Path) -> None:
        thread = threading.Thread(target=self._follow, args=(path.open("rb"),), daemon=True)
        thread.start()
        self._thread = thread  # not before: a signal may come in the middle of it, and what has not started has no end

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self, file: IO[bytes]) -> None:
        with file:
            ended = False
            while not ended:
                ended = self._ended.wait(FOLLOW_SECONDS)
                os.write(2, file.read())
