"""Notices, while calls wait for a server, that it cannot answer them: it is gone or stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from ...errors import ServerError

LOOK_SECONDS = 2.0
"""After how much silence a server is asked, and how often then, however many calls wait for it."""
ANSWER_SECONDS = 5.0
"""Within how many seconds a server must say that it is healthy."""
LOOKS = 2
"""After how many bad looks in a row the calls end. One may be bad by chance."""
STOPPED_SECONDS = 8.0
"""After how much silence an inference call asks whether somebody has stopped the server."""


async def _not_stopped() -> str:
    return ""


class CallWatch:
    """Looks at a server while calls wait for it and no answer comes. What is no progress does not count as an answer.

    Args:
        url: The server's, for errors.
        look: Asks for the server's health. Returns the error that calls end with, or None.
    """

    def __init__(self, url: str, look: Callable[[], Awaitable[ServerError | None]]) -> None:
        self.why_stopped: Callable[[], Awaitable[str]] = _not_stopped
        """Asks why no request will be sampled before somebody acts; empty if the server runs."""
        self._url, self._look = url, look
        self._open: dict[asyncio.Timeout, bool] = {}
        """The calls that wait, and whether each is for inference."""
        self._problems: dict[asyncio.Timeout, ServerError] = {}
        self._progress = 0.0
        self._task: asyncio.Task[None] | None = None

    def progressed(self) -> None:
        """Note that the server has sampled something, or has answered a call."""
        self._progress = time.monotonic()

    @asynccontextmanager
    async def guarding(self, *, inference: bool) -> AsyncGenerator[None]:
        """Raise `ServerError` in the block, which waits for an answer, once the server cannot give one."""
        scope = asyncio.timeout(None)
        try:
            async with scope:
                if not self._open:
                    self.progressed()
                self._open[scope] = inference
                if self._task is None or self._task.done():
                    self._task = asyncio.create_task(self._watch())
                yield
            self.progressed()
        except TimeoutError:
            if (error := self._problems.get(scope)) is None:
                raise
            raise error from None
        finally:
            self._open.pop(scope, None)
            self._problems.pop(scope, None)

    async def _watch(self) -> None:
        bad = 0
        while self._open:
            await asyncio.sleep(LOOK_SECONDS)
            before = self._progress
            error, inference_only = None, False
            if time.monotonic() - before >= LOOK_SECONDS and (error := await self._look()) is None:
                error, inference_only = await self._stopped(), True
            bad = bad + 1 if error is not None and self._progress == before else 0
            if error is not None and bad >= LOOKS:
                self._end(error, inference_only=inference_only)
                bad = 0

    async def _stopped(self) -> ServerError | None:
        """The error of inference calls, if somebody has stopped the server."""
        silent = time.monotonic() - self._progress
        if silent < STOPPED_SECONDS or not any(self._open.values()) or not (reason := await self.why_stopped()):
            return None
        return ServerError(reason, url=self._url, retryable=True)

    def _end(self, error: ServerError, *, inference_only: bool) -> None:
        now = asyncio.get_running_loop().time()
        for scope, inference in self._open.items():
            if (inference or not inference_only) and scope not in self._problems:
                self._problems[scope] = ServerError(
                    error.problem,
                    url=self._url,
                    status=error.status,
                    reason=error.reason,
                    server_message=error.server_message,
                    retryable=True,
                )
                scope.reschedule(now)
