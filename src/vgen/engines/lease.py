"""Who may change a server: a lease, so that a trainer that was given up cannot disturb the one that follows it."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MAX_TTL_SECONDS = 86_400.0


class LeaseConflict(Exception):
    """The lease is another's, or nobody's any more; the message says whose."""


@dataclass(slots=True)
class _Lease:
    holder: str
    token: str
    epoch: int
    ttl_seconds: float
    taken: float
    expires: float
    in_flight: int = 0


class LeaseBook:
    """One server's lease: held by at most one holder, until released, expired or taken over.

    Each call under the lease renews it, and it does not expire while such a call is under way. Epochs count
    up by one with every new holder. `clock` gives monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lease: _Lease | None = None
        self._epoch = 0

    def take(self, holder: str, ttl_seconds: float, *, takeover: bool = False) -> dict[str, Any]:
        """Give the lease to `holder`; returns its token, epoch and time. Raises `LeaseConflict` where it is held."""
        if not takeover and (held := self._held()):
            raise LeaseConflict(f"{_who(held, self._clock())}; wait, or take it over with takeover: true")
        self._epoch += 1
        now = self._clock()
        token = secrets.token_urlsafe(32)
        self._lease = _Lease(holder, token, self._epoch, ttl_seconds, now, now + ttl_seconds)
        return {"token": token, "epoch": self._epoch, "ttl_seconds": ttl_seconds}

    def renew(self, token: str | None) -> dict[str, Any]:
        """Start the time of the caller's lease anew."""
        with self.used(token) as lease:
            return {"epoch": lease.epoch, "ttl_seconds": lease.ttl_seconds}

    def release(self, token: str | None) -> None:
        """End the caller's lease."""
        with self.used(token):
            self._lease = None

    @contextmanager
    def used(self, token: str | None) -> Iterator[_Lease]:
        """Be under the lease that `token` stands for."""
        lease = self._held()
        if lease is None or token is None or not hmac.compare_digest(lease.token.encode(), token.encode()):
            raise LeaseConflict(_who(lease, self._clock()))
        lease.in_flight += 1
        try:
            yield lease
        finally:
            lease.in_flight -= 1
            lease.expires = self._clock() + lease.ttl_seconds

    @property
    def free(self) -> bool:
        """Whether nobody holds it."""
        return self._held() is None

    def describe(self) -> dict[str, Any] | None:
        """Who holds it, without the token."""
        lease = self._held()
        if lease is None:
            return None
        now = self._clock()
        return {
            "holder": lease.holder,
            "epoch": lease.epoch,
            "held_seconds": round(now - lease.taken, 3),
            "expires_in_seconds": round(max(lease.expires - now, 0.0), 3),
        }

    def _held(self) -> _Lease | None:
        lease = self._lease
        return lease if lease is not None and (lease.in_flight or self._clock() < lease.expires) else None


def _who(lease: _Lease | None, now: float) -> str:
    if lease is None:
        return "nobody holds this server's lease: it has expired or was released; take it again"
    return f"{lease.holder!r} holds this server's lease (epoch {lease.epoch}, taken {now - lease.taken:.0f} s ago)"
