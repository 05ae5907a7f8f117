"""Why a `vgen serve` server refuses a call: clients compare with these reasons, never with a message."""

from __future__ import annotations

from enum import StrEnum


class RefusalReason(StrEnum):
    """The `error.type` in the JSON body of a refusal."""

    CONTROL_KEY = "vgen_control_key"
    """401: the control key is missing or wrong."""
    LEASE = "vgen_lease"
    """409: another client holds the lease, or the caller's lease has ended. `error.lease` says who holds it."""
    WEIGHTS = "vgen_weights"
    """409 or 503: the state of the weights does not permit the call."""
    ENGINE = "vgen_engine"
    """503: the engine cannot work. A process of it has ended, is stopped, or answers nothing."""
    BAD_REQUEST = "vgen_bad_request"
    """400 or 413: the body is not a valid request."""
    NOT_FOUND = "vgen_not_found"
    """404: vgen has no such route."""
