"""Runs calls that may hang, with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress


def within(timeout: float, *calls: Callable[[], object]) -> bool:
    """Run the calls in parallel, each on a daemon thread. True if all of them returned in time, without an error.

    A call that takes longer than `timeout` seconds is left running. During interpreter shutdown, when no thread can be
    started, the calls run on this thread, one after the other.
    """
    deadline = time.monotonic() + timeout
    succeeded: list[Callable[[], object]] = []

    def attempt(call: Callable[[], object]) -> None:
        with suppress(Exception):  # the caller sees it in the result
            call()
            succeeded.append(call)

    threads = [threading.Thread(target=attempt, args=(call,), name="vgen-deadline", daemon=True) for call in calls]
    for thread in threads:
        try:
            thread.start()
        except RuntimeError:
            thread.run()
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, deadline - time.monotonic()))
    return len(succeeded) == len(calls)
