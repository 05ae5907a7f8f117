"""The client's side of a server's lease: takes it, renews it in the background, takes it again, releases it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ...errors import EngineError, ServerError
from ..refusal_reasons import RefusalReason
from ..server_api import INFO, INSTANCE, LEASE, LEASE_RELEASE, LEASE_RENEW
from .http import HttpClient

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""Lifetime of a lease. After a trainer dies, another one can take its servers after this time."""
CALL_SECONDS = 10.0
RETRY_SECONDS = 1.0
"""Between two attempts to take a lease that another trainer holds."""
RENEWED_SECONDS = 2.0
"""A lease whose end has moved by more than this was renewed: its holder is alive."""


class LeaseHolder:
    """Holds the lease of one server, which permits this process to change it, until `release`.

    A lease ends while the trainer is suspended, or when the server restarts. Then it is taken again, if it is free.

    Args:
        http: The client for the server.
        on_gap: Called when the lease was taken again, and another client may have held it meanwhile.
    """

    def __init__(self, http: HttpClient, on_gap: Callable[[], object] = lambda: None) -> None:
        self._http, self._on_gap = http, on_gap
        self._renewing: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._term: tuple[Any, Any] = None, None
        """The server process that gave the lease, and the lease's number there (its epoch)."""

    async def take(self, timeout: float, *, takeover: bool) -> None:
        """Take the lease.

        Waits up to `timeout` seconds for the lease of a dead trainer to expire, but not longer than a lease lasts.
        Raises `EngineError` if another trainer still holds the lease after that. With `takeover` the server gives the
        lease to this process at once.
        """
        deadline = time.monotonic() + min(timeout, LEASE_SECONDS + CALL_SECONDS)
        watch = _HolderWatch()
        while True:
            try:
                async with self._lock:
                    await self._take(takeover=takeover)
                break
            except ServerError as error:
                if error.status != 409:
                    raise
                watch.see(await self._current())
                if time.monotonic() > deadline:
                    alive = ", which is alive," if watch.alive else ""
                    raise EngineError(
                        f"another trainer{alive} holds the lease of {self._http.name}: "
                        f"{error.server_message or error}; construct with connection=ServerConnection(takeover=True) "
                        "to take it over"
                    ) from None
                await asyncio.sleep(RETRY_SECONDS)
        self._keep_renewing()

    async def hold(self) -> None:
        """Make sure that this process has the lease: renew it, or take it again if it has ended and is free.

        Raises `ServerError` with the status 409 if another client holds it.
        """
        async with self._lock:
            try:
                await self._http.post(LEASE_RENEW, {}, timeout=CALL_SECONDS)
            except ServerError as error:
                if error.status != 409:
                    raise
                await self._take_again()
        self._keep_renewing()

    async def release(self) -> None:
        """Give the lease back. Does nothing if this process does not hold it."""
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
        if self._http.lease is not None:
            with suppress(ServerError):
                await self._http.post(LEASE_RELEASE, {}, timeout=CALL_SECONDS)
            self._http.lease = None

    async def _take(self, *, takeover: bool) -> None:
        request = {"holder": f"{socket.gethostname()}:{os.getpid()}", "ttl_seconds": LEASE_SECONDS}
        answer = await self._http.post(LEASE, {**request, "takeover": takeover}, timeout=CALL_SECONDS)
        self._http.lease = answer["token"]
        instance = None
        with suppress(ServerError, KeyError, TypeError):
            instance = (await self._http.get(INSTANCE, timeout=CALL_SECONDS))["instance"]
        self._term = instance, answer.get("epoch")

    async def _take_again(self) -> None:
        """Take the lease that has ended. The weights are unknown if another client may have held it meanwhile."""
        instance, epoch = self._term
        try:
            await self._take(takeover=False)
        except ServerError as error:
            if error.status != 409:
                raise
            raise ServerError(
                f"this trainer has lost its lease: {error.server_message or error}",
                url=self._http.name,
                status=409,
                reason=RefusalReason.LEASE,
                server_message=error.server_message,
            ) from error
        logger.warning("vgen: the lease of %s had ended, and was taken again", self._http.name)
        known = instance is not None and isinstance(epoch, int)
        if not known or self._term != (instance, epoch + 1):
            self._on_gap()

    async def _current(self) -> Mapping[str, Any] | None:
        """Who holds the lease now, as the server describes it; None if it does not tell."""
        with suppress(ServerError, KeyError, TypeError):
            lease = (await self._http.get(INFO, timeout=CALL_SECONDS))["lease"]
            return lease if isinstance(lease, dict) else None
        return None

    def _keep_renewing(self) -> None:
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            try:
                await self.hold()
            except ServerError as error:
                if error.status == 409:  # the next change of the server asks again
                    logger.warning("vgen: %s", error)
                    return


class _HolderWatch:
    """Tells from several looks at a lease whether its holder is alive."""

    def __init__(self) -> None:
        self.alive = False
        """Whether a holder has renewed the lease, or has a call under way. Otherwise it may be dead."""
        self._first: tuple[Any, float] | None = None

    def see(self, lease: Mapping[str, Any] | None) -> None:
        """Note what the server says of the lease now."""
        if lease is None or not isinstance(left := lease.get("expires_in_seconds"), int | float):
            return
        seen = lease.get("epoch"), time.monotonic() + left
        first = self._first = self._first or seen
        # A lease that has no time left ends only after the call that its holder has under way.
        self.alive = self.alive or left <= 0 or seen[0] != first[0] or seen[1] > first[1] + RENEWED_SECONDS
