"""OpenTelemetry's current span: which it is, and which it was before. `OTelSink` makes vgen's spans current here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from opentelemetry import trace
from opentelemetry.context import Context, attach, create_key, get_current

from ..span_model import Link, Span
from .otel_metrics import Timer

VGEN_SPAN = create_key("vgen-span")
"""Under this key a context holds the vgen span that it was made for."""
CURRENT_SPAN: str = next(iter(trace.set_span_in_context(trace.INVALID_SPAN, Context())))
"""OpenTelemetry's own key of the current span. With it, one step makes a context that has both spans."""


@dataclass(frozen=True, slots=True)
class SpanTemplate:
    """What all spans of one name have in common in OpenTelemetry."""

    name: str
    attributes: Mapping[str, Any] | None
    """Attributes that a convention adds."""
    record_duration: Timer | None


Handle: TypeAlias = "tuple[trace.SpanContext, trace.Span | None, Context | None, Context, Sequence[Link], SpanTemplate]"
"""`Span.handle`: the span's OpenTelemetry IDs; OpenTelemetry's span while it is open; the context in which that span
is current; the context before; the links that the span was opened with; the template of its name. A plain tuple,
because a named tuple takes longer to make, and every span makes two."""


def parent_context(span: Span, here: Context) -> tuple[Context, Context, trace.SpanContext]:
    """Find the parent of a new span, in the cases where it is not simply OpenTelemetry's current span.

    Returns the context to restore when the span ends, the context to start the span in, and the span that is current
    in the latter. If the caller has opened a current span with plain OpenTelemetry, that span is the parent, not
    vgen's open span.
    """
    while span.current:
        parent = trace.get_current_span(here).get_span_context()
        vgen_span: Any = here.get(VGEN_SPAN)
        if vgen_span is None or vgen_span.handle[0] != parent:
            if not parent.is_valid:
                break
            return here, here, parent
        if vgen_span is span.parent or vgen_span.end_ns is None:
            return here, here, parent
        # That span has ended on another thread, or in the process that forked this one: here it is still current.
        here = vgen_span.handle[3]
    if span.parent is not None and span.parent.handle is not None:
        parent = span.parent.handle[0]
    elif span.parent_id is not None:
        parent = span_context(Link(span.trace_id, span.parent_id), span.sampled, is_remote=span.parent is None)
    else:
        return here, here, trace.get_current_span(here).get_span_context()
    return here, trace.set_span_in_context(trace.NonRecordingSpan(parent), here), parent


def restore_context(attached: Context, otel_span: trace.Span, before: Context) -> None:
    """Make `before` current again, if `attached` (the span's own context) is not simply the current one."""
    here = get_current()
    if trace.get_current_span(here) is otel_span:
        attach(before)
        return
    # A span that was opened within this one is still open. Change its handle: its end must not restore this context.
    vgen_span: Any = here.get(VGEN_SPAN)
    while vgen_span is not None:
        handle: Handle = vgen_span.handle
        if handle[3] is attached:
            vgen_span.handle = (*handle[:3], before, *handle[4:])
            return
        vgen_span = handle[3].get(VGEN_SPAN)


def span_context(link: Link, sampled: bool = True, is_remote: bool = False) -> trace.SpanContext:
    """Return the identity of a span in OpenTelemetry's form."""
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if sampled else trace.TraceFlags.DEFAULT)
    return trace.SpanContext(int(link.trace_id, 16), int(link.span_id, 16), is_remote, flags)
