"""The threads in which asynchronous callers generate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from ..engine_protocol import Cancellation

T = TypeVar("T")
MOST_THREADS = 1024
"""How many calls run at a time. A thread starts only when a call needs it."""


class CallThreads:
    """Runs calls of one generation object in threads of its own.

    asyncio's default executor has too few for a trainer with hundreds of rollouts in flight.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False

    async def run(self, call: Callable[[], T], cancellation: Cancellation) -> T:
        """Run `call` in a thread, with the caller's context variables. Cancelling the task cancels `cancellation`."""
        if self._closed:
            return call()  # which the engine refuses
        if self._executor is None:
            self._executor = ThreadPoolExecutor(MOST_THREADS, "vgen-generate")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, copy_context().run, call)
        except asyncio.CancelledError:
            cancellation.cancel()
            raise

    def close(self) -> None:
        """Let the threads end after their calls, without waiting for them."""
        self._closed = True
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)
