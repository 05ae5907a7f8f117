"""Threads for asynchronous callers."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar

import pytest

from vgen.engine_protocol import Cancellation
from vgen.generation.call_threads import CallThreads

VALUE: ContextVar[str] = ContextVar("VALUE")


def test_a_call_runs_in_a_thread_with_the_callers_context():
    threads = CallThreads()

    async def ask() -> tuple[str, str]:
        VALUE.set("the caller's")
        return await threads.run(lambda: (VALUE.get(), threading.current_thread().name), Cancellation())

    value, thread = asyncio.run(ask())
    assert (value, thread.startswith("vgen-generate")) == ("the caller's", True)
    threads.close()


def test_cancelling_the_task_cancels_the_call():
    threads, cancellation, began = CallThreads(), Cancellation(), threading.Event()
    ended = threading.Event()

    def call() -> None:
        began.set()
        assert ended.wait(20)

    async def cancel() -> None:
        task = asyncio.create_task(threads.run(call, cancellation))
        await asyncio.to_thread(began.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert cancellation.cancelled
    ended.set()
    threads.close()


def test_after_close_no_thread_is_made():
    threads = CallThreads()
    threads.close()
    name = asyncio.run(threads.run(lambda: threading.current_thread().name, Cancellation()))
    assert not name.startswith("vgen-generate")
    threads.close()
