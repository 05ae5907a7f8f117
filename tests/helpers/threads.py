"""A call that runs in a thread while a test observes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def at_work(call: Callable[[], Any], seconds: float = 120.0) -> Iterator[list[Any]]:
    """Run `call` in a thread; yields a list that gets its result. `call` must return soon after the block's end."""
    results: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield results
    finally:
        thread.join(seconds)
    assert not thread.is_alive()
    assert failed == []
