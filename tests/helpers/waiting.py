"""How tests wait: until a condition is true, and never for time to pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")
_never = threading.Event()


def wait_until(condition: Callable[[], T], timeout: float = 10.0, *, every: float = 0.005) -> T:
    """Call `condition` until it returns something true, and return that.

    An `AssertionError` within it means "not yet", so a condition may be written as assertions; the last one is
    raised when `timeout` seconds are over.
    """
    deadline = monotonic() + timeout
    while True:
        error = None
        try:
            if value := condition():
                return value
        except AssertionError as raised:
            error = raised
        if monotonic() > deadline:
            raise error or AssertionError(f"not true within {timeout:g} s: {condition}")
        _never.wait(every)
