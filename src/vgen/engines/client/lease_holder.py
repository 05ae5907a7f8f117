"""The client's side of a server's lease: takes it, renews it in the background, releases it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from contextlib import suppress

from ...errors import EngineError, ServerError
from ..server_api import LEASE, LEASE_RELEASE, LEASE_RENEW
from .http import HttpClient

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""Lifetime of a lease. After a trainer dies, another one can take its servers after this time."""
CALL_SECONDS = 10.0
RETRY_SECONDS = 1.0
"""Between two attempts to take a lease that another trainer holds."""


class LeaseHolder:
    """Holds the lease of one server, which permits this process to change it, until `release`."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        self._renewing: asyncio.Task[None] | None = None

    async def take(self, timeout: float, *, takeover: bool) -> None:
        """Take the lease.

        Waits up to `timeout` seconds for the lease of a dead trainer to expire, but not longer than a lease lasts.
        Raises `EngineError` if another trainer still holds the lease after that. With `takeover` the server gives the
        lease to this process at once.
        """
        if self._renewing is not None:
            self._renewing.cancel()
        self._http.lease = None
        holder = f"{socket.gethostname()}:{os.getpid()}"
        request = {"holder": holder, "ttl_seconds": LEASE_SECONDS, "takeover": takeover}
        deadline = time.monotonic() + min(timeout, LEASE_SECONDS + CALL_SECONDS)
        while True:
            try:
                self._http.lease = (await self._http.post(LEASE, request, timeout=CALL_SECONDS))["token"]
                break
            except ServerError as error:
                if error.status != 409:
                    raise
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"another trainer, which is alive, holds the lease of {self._http.name}: "
                        f"{error.server_message or error}; construct with connection=ServerConnection(takeover=True) "
                        "to take it over"
                    ) from None
                await asyncio.sleep(RETRY_SECONDS)
        self._renewing = asyncio.create_task(self._renew())

    async def release(self) -> None:
        """Give the lease back. Does nothing if this process does not hold it."""
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
            with suppress(ServerError):
                await self._http.post(LEASE_RELEASE, {}, timeout=CALL_SECONDS)
            self._http.lease = None

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            try:
                await self._http.post(LEASE_RENEW, {}, timeout=CALL_SECONDS)
            except ServerError as error:
                if error.status == 409:  # the server refuses whatever this process sends from now on
                    logger.warning("vgen: another trainer has taken over %s: %s", self._http.name, error.server_message)
                    return
