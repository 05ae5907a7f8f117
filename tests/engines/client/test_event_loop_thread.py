"""The event loop's thread: calls that run together, and its end."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
from helpers.waiting import wait_until

from vgen.engines.client.event_loop_thread import EventLoopThread


def test_run_all_ends_every_call_before_it_raises(loop):
    ended = []

    async def slow():
        await asyncio.sleep(0.05)
        ended.append(True)

    async def fails():
        raise OSError("first")

    with pytest.raises(OSError, match="first"):
        loop.run_all([fails(), slow()])
    assert ended == [True]
    assert loop.run_all([]) == []


@pytest.mark.fault(
    point="what holds a server's connections",
    did="An event loop's owner is dropped",
    happens="Its thread ends",
    within=20,
)
def test_a_loop_that_is_dropped_ends_its_thread():
    made = EventLoopThread()
    (thread,) = [each for each in threading.enumerate() if each.name == "vgen-http"][-1:]
    assert made.run(asyncio.sleep(0, "ran")) == "ran"
    del made
    gc.collect()
    wait_until(lambda: not thread.is_alive())


def test_what_still_runs_when_a_loop_ends_is_cancelled_and_waited_for():
    made, started, cleaned = EventLoopThread(), threading.Barrier(4), list[str]()

    async def call(name: str, seconds: float):
        try:
            await asyncio.to_thread(started.wait, 5)
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(seconds)
            cleaned.append(name)

    futures = [made.start(call(name, seconds)) for name, seconds in (("at once", 0), ("late", 0.05), ("later", 0.1))]
    started.wait(5)
    made.close()
    assert cleaned == ["at once", "late", "later"]
    assert all(future.done() for future in futures)
