"""Trace and span ids after W3C Trace Context: 16 and 8 random bytes as lowercase hex.

They come from the operating system. Trainers and vLLM reseed Python's `random`, often with the same
seed on every rank, and ids drawn from it then collide across ranks.
"""

from __future__ import annotations

import os
from collections import deque

_BATCH = 512
_INVALID = "0" * 16
_pool: deque[str] = deque()
os.register_at_fork(after_in_child=_pool.clear)


def new_span_id() -> str:
    """A fresh span id: 16 hex digits, never all zero."""
    try:
        return _pool.pop()
    except IndexError:
        # One system call for many ids: os.urandom for each would cost more than the rest of a span.
        digits = os.urandom(8 * _BATCH).hex()
        if _INVALID not in digits:
            _pool.extend([digits[i : i + 16] for i in range(0, 16 * _BATCH, 16)])
        return new_span_id()


def new_trace_id() -> str:
    """A fresh trace id: 32 hex digits, never all zero."""
    return new_span_id() + new_span_id()
