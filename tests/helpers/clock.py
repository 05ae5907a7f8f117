"""A clock that stands still, for tests of what depends on time: no busy machine can make them fail."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from helpers.waiting import wait_until


class Clock:
    """In the place of `time.monotonic_ns`, which spans and stalls are timed by. It goes on when a test advances it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = time.monotonic_ns()
        self._reads = Counter[str]()
        monkeypatch.setattr(time, "monotonic_ns", self)

    def __call__(self) -> int:
        self._reads[threading.current_thread().name] += 1
        return self.now_ns

    def advance(self, seconds: float) -> None:
        """Let this much time pass."""
        self.now_ns += round(seconds * 1e9)

    def wait_for(self, thread: str) -> None:
        """Wait until the thread of that name has seen the time of now, and done what it does about it."""
        seen = self._reads[thread]
        wait_until(lambda: self._reads[thread] >= seen + 2)  # at the second look the first one is over
