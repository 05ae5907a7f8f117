"""The lease of a server: it names the one client that may change the server.

It keeps a trainer that was given up, but still runs, from changing the servers of the trainer that replaced it.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

MAX_TTL_SECONDS = 86_400.0


class LeaseRequest(msgspec.Struct):
    """The body of a request for the lease."""

    holder: Annotated[str, msgspec.Meta(pattern=r"\S", max_length=200)]
    """Names the caller, for people who read a refusal."""
    ttl_seconds: Annotated[float, msgspec.Meta(ge=1, le=MAX_TTL_SECONDS)] = 60.0
    takeover: bool = False
    """Whether to take the lease from a client that still holds it."""


class LeaseConflict(Exception):
    """The caller does not hold the lease. The message says who does."""


@dataclass(slots=True)
class _Lease:
    holder: str
    token: str
    epoch: int
    ttl_seconds: float
    taken: float
    expires: float
    in_flight: int = 0
    """Calls under the lease that have not ended."""


class LeaseBook:
    """The lease of one server. At most one client holds it, until it is released, expires or is taken over.

    Each call under the lease renews it, and it does not expire during such a call. Each new holder gets the next epoch
    number. `clock` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lease: _Lease | None = None
        self._epoch = 0

    def take(self, holder: str, ttl_seconds: float, *, takeover: bool = False) -> dict[str, Any]:
        """Give the lease to `holder` and return its token, epoch and lifetime.

        Raises `LeaseConflict` if another client holds it, unless `takeover` is true.
        """
        if not takeover and (current := self._current()):
            raise LeaseConflict(f"{self._describe_holder(current)}; wait, or take it over with takeover: true")
        self._epoch += 1
        now = self._clock()
        token = secrets.token_urlsafe(32)
        self._lease = _Lease(holder, token, self._epoch, ttl_seconds, now, now + ttl_seconds)
        return {"token": token, "epoch": self._epoch, "ttl_seconds": ttl_seconds}

    def renew(self, token: str | None) -> dict[str, Any]:
        """Restart the lifetime of the caller's lease."""
        with self.using(token) as lease:
            return {"epoch": lease.epoch, "ttl_seconds": lease.ttl_seconds}

    def release(self, token: str | None) -> str:
        """End the caller's lease, and return its holder."""
        with self.using(token) as lease:
            self._lease = None
            return lease.holder

    def check(self, token: str | None) -> None:
        """Raise `LeaseConflict` if this is not the token of the current lease. Does not renew the lease."""
        self._held(token)

    @contextmanager
    def using(self, token: str | None) -> Iterator[_Lease]:
        """Run the block under the lease with this token. Raises `LeaseConflict` if that is not the current lease.

        The lease does not expire before the block ends: enter it only once all that the call needs has arrived.
        """
        lease = self._held(token)
        lease.in_flight += 1
        try:
            yield lease
        finally:
            lease.in_flight -= 1
            lease.expires = self._clock() + lease.ttl_seconds

    @property
    def free(self) -> bool:
        """Whether nobody holds the lease."""
        return self._current() is None

    @property
    def expired_holder(self) -> str | None:
        """The last holder, if the lease has expired and was neither released nor taken since."""
        return self._lease.holder if self._lease is not None and self.free else None

    def describe(self) -> dict[str, Any] | None:
        """Who holds the lease, without its token; None if nobody does."""
        lease = self._current()
        if lease is None:
            return None
        now = self._clock()
        return {
            "holder": lease.holder,
            "epoch": lease.epoch,
            "held_seconds": round(now - lease.taken, 3),
            "expires_in_seconds": round(max(lease.expires - now, 0.0), 3),
        }

    def _held(self, token: str | None) -> _Lease:
        lease = self._current()
        if lease is None or token is None or not hmac.compare_digest(lease.token.encode(), token.encode()):
            raise LeaseConflict(self._describe_holder(lease))
        return lease

    def _current(self) -> _Lease | None:
        lease = self._lease
        return lease if lease is not None and (lease.in_flight or self._clock() < lease.expires) else None

    def _describe_holder(self, lease: _Lease | None) -> str:
        if lease is None:
            return "nobody holds this server's lease: it has expired or was released; take it again"
        age = self._clock() - lease.taken
        return f"{lease.holder!r} holds this server's lease (epoch {lease.epoch}, taken {age:.0f} s ago)"
