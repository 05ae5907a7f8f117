"""The end of a server engine: leases are released and connections closed, whoever ends it, and in whatever thread."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack

from .endpoint import Endpoint
from .event_loop_thread import EventLoopThread
from .http import HttpClient

logger = logging.getLogger("vgen.engines.client.engine")

CLOSE_SECONDS = 5.0
"""How long `close` waits for the servers to take their leases back."""


def let_go(
    loop: EventLoopThread,
    endpoints: Sequence[Endpoint],
    clients: Sequence[HttpClient],
    cleanup: ExitStack,
    owner: int,
) -> None:
    """Close what an engine had that nobody closed, when it is collected or the process exits."""
    if os.getpid() != owner:  # a forked child runs the finalizer, too
        return
    if threading.main_thread().is_alive():
        # The collector runs in any thread at any moment, perhaps in that of the loop: wait for nothing.
        loop.close_after(disconnect(endpoints, clients), cleanup.close, CLOSE_SECONDS)
    else:  # at exit
        close(loop, endpoints, clients, cleanup)


def close(
    loop: EventLoopThread, endpoints: Sequence[Endpoint], clients: Sequence[HttpClient], cleanup: ExitStack
) -> None:
    try:
        cleanup.close()
    finally:
        try:
            loop.run(disconnect(endpoints, clients), CLOSE_SECONDS)
        except TimeoutError:
            logger.warning("vgen: left connections open: the servers did not answer within %g s", CLOSE_SECONDS)
        finally:
            loop.close()


async def disconnect(endpoints: Sequence[Endpoint], clients: Sequence[HttpClient]) -> None:
    """Release the leases and close the connections."""
    leases = [endpoint.lease.release() for endpoint in endpoints if endpoint.lease is not None]
    await asyncio.gather(*leases, return_exceptions=True)
    await asyncio.gather(*(client.close() for client in clients), return_exceptions=True)
