"""An asyncio event loop on its own thread, for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class EventLoopThread:
    """Runs an asyncio event loop on its own thread, for callers that are not asynchronous.

    The thread ends with `close` or `close_after`, or when nobody has this object any more.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="vgen-http", daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._loop, os.getpid())
        self._ending: asyncio.Future[None] | None = None

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the coroutine and return its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run the coroutine and return its result.

        An exception in the calling thread (`KeyboardInterrupt`, for example) cancels the coroutine. Raises
        `TimeoutError` if it takes longer than `timeout` seconds.
        """
        future = self.start(coroutine)
        try:
            return future.result(timeout)
        finally:
            future.cancel()  # has no effect on a coroutine that has ended

    def run_all(self, coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run the coroutines concurrently and return their results. All of them end before an error is raised."""

        async def together() -> list[T]:
            tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
            await asyncio.gather(*tasks, return_exceptions=True)
            return [task.result() for task in tasks]

        return self.run(together())

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        self._stop()
        self._thread.join(5.0)

    def close_after(self, last: Coroutine[Any, Any, object], then: Callable[[], object], timeout: float) -> None:
        """Have the loop's thread run `last`, for at most `timeout` seconds, then call `then`, and end. Returns at once.

        A finalizer may call it: it takes no lock and waits for nothing, whichever thread the finalizer runs in.
        """

        async def end() -> None:
            try:
                await asyncio.wait_for(last, timeout)
            except Exception as error:
                logger.warning("vgen: connections were left open: %s", type(error).__name__)
            try:
                then()
            finally:
                self._stop()

        def begin() -> None:
            self._ending = asyncio.ensure_future(end())

        try:
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError:  # the loop is closed already
            last.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """The loop's thread. It has no reference to the `EventLoopThread`, so that this can be collected."""
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_others())
    finally:
        loop.close()


async def _cancel_others() -> None:
    """Cancel all tasks of the loop but this one, and wait for them."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _stop(loop: asyncio.AbstractEventLoop, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has a copy of the loop, and not its thread
        with suppress(RuntimeError):  # it is closed already
            loop.call_soon_threadsafe(loop.stop)
