"""W3C Trace Context: how a span's identity travels to another process."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import NamedTuple

from .records import Span

logger = logging.getLogger("vgen.telemetry")

TRACEPARENT = "traceparent"

_PATTERN = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Remote(NamedTuple):
    """A span of another process."""

    trace_id: str
    span_id: str
    sampled: bool


def pack(span: Span | Remote | None) -> dict[str, str]:
    """The carrier of a span; empty without one."""
    return {} if span is None else {TRACEPARENT: f"00-{span.trace_id}-{span.span_id}-{int(span.sampled):02x}"}


def unpack(carrier: Mapping[str, str] | None) -> Remote | None:
    """The span in a carrier, None without one. A `traceparent` that cannot be read is passed over with a warning."""
    try:
        header = carrier.get(TRACEPARENT) if carrier else None
        if header is None:
            return None
        found = _PATTERN.fullmatch(header)
    except (AttributeError, TypeError):
        found = None
    if found is None or (found[1] == "00" and found[5]):  # a later version may have more to say
        logger.warning("vgen: a malformed traceparent is passed over: spans begin a trace of their own")
        return None
    return Remote(found[2], found[3], bool(int(found[4], 16) & 1))
