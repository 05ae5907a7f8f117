"""Calls that may hang, within a time of our own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def within(timeout: float, *calls: Callable[[], object]) -> bool:
    """Make the calls side by side, each on a daemon thread. True when all came back, and without an error, in time.

    What takes longer than `timeout` seconds is left behind. At interpreter exit, where no thread can be
    started any more, the calls are made here, one after the other.
    """
    deadline = time.monotonic() + timeout
    done = [_Attempt(call) for call in calls]
    return all([attempt.wait(deadline) for attempt in done])


class _Attempt:
    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._well, self._over = call, False, threading.Event()
        try:
            threading.Thread(target=self._run, name="vgen-deadline", daemon=True).start()
        except RuntimeError:
            self._run()

    def wait(self, deadline: float) -> bool:
        return self._over.wait(max(0.0, deadline - time.monotonic())) and self._well

    def _run(self) -> None:
        try:
            self._call()
            self._well = True
        except Exception:
            pass  # `wait` says so
        finally:
            self._over.set()
