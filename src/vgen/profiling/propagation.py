"""W3C Trace Context (https://www.w3.org/TR/trace-context/): how a span's identity travels to another process."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import NamedTuple

from .span_model import Span

logger = logging.getLogger("vgen.telemetry")

TRACEPARENT = "traceparent"

_PATTERN = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class RemoteSpan(NamedTuple):
    """A span of another process."""

    trace_id: str
    span_id: str
    sampled: bool


def pack(span: Span | RemoteSpan | None, sampled: bool = True) -> dict[str, str]:
    """Return a carrier with the span's `traceparent`, sampled if the span is and `sampled`; an empty one for None."""
    if span is None:
        return {}
    return {TRACEPARENT: f"00-{span.trace_id}-{span.span_id}-{int(span.sampled and sampled):02x}"}


def unpack(carrier: Mapping[str, str] | None) -> RemoteSpan | None:
    """Return the span in a carrier, or None. A `traceparent` that is not valid is ignored with a warning."""
    try:
        header = carrier.get(TRACEPARENT) if carrier else None
        if header is None:
            return None
        match = _PATTERN.fullmatch(header)
    except (AttributeError, TypeError):
        match = None
    if match is None or (match[1] == "00" and match[5]):  # later versions may append fields, version 00 may not
        logger.warning("vgen: ignored a malformed traceparent: spans start a new trace")
        return None
    return RemoteSpan(match[2], match[3], bool(int(match[4], 16) & 1))
