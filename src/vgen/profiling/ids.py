"""Trace IDs (16 random bytes) and span IDs (8), as lowercase hexadecimal; see W3C Trace Context.

The randomness comes from the operating system. Trainers and vLLM seed Python's `random`, often with the same seed on
all ranks: IDs from it would collide across ranks.
"""

from __future__ import annotations

import os
from collections import deque

_BATCH = 512
_INVALID = "0" * 16
_pool: deque[str] = deque()
os.register_at_fork(after_in_child=_pool.clear)


def new_span_id() -> str:
    """Return a new span ID: 16 hexadecimal digits, never all zero."""
    try:
        return _pool.pop()
    except IndexError:
        # One system call for many IDs: an `os.urandom` for each would cost more than the rest of a span.
        digits = os.urandom(8 * _BATCH).hex()
        if _INVALID not in digits:
            _pool.extend([digits[i : i + 16] for i in range(0, 16 * _BATCH, 16)])
        return new_span_id()


def new_trace_id() -> str:
    """Return a new trace ID: 32 hexadecimal digits, never all zero."""
    return new_span_id() + new_span_id()
