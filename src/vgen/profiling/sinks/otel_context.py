"""Which span is OpenTelemetry's current one, and which was before: the half of `OTelSink` that keeps track."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from opentelemetry import trace
from opentelemetry.context import Context, attach, create_key, get_current

from ..records import Link, Span

if TYPE_CHECKING:
    from .otel import Plan

OURS = create_key("vgen-span")
"""Where a context holds the vgen span that it was made for."""
CURRENT: str = next(iter(trace.set_span_in_context(trace.INVALID_SPAN, Context())))
"""OpenTelemetry's own key of the current span, so that a context with both is made in one go."""

Handle: TypeAlias = "tuple[trace.SpanContext, trace.Span | None, Context | None, Context, Sequence[Link], Plan]"
"""What `Span.handle` is: the span's own ids; OpenTelemetry's span while it is open, and the context in which it was
made current; the context before that; the links that it was opened with; what becomes of spans of its name."""


def above(span: Span, here: Context) -> tuple[Context, Context, trace.SpanContext]:
    """What a new span lies beneath, where it is not simply OpenTelemetry's current span.

    That is: the context to go back to in the end, the one to start in, the span that is current in it. A
    span of the caller's own that is current goes before vgen's tree.
    """
    while span.current:
        found = trace.get_current_span(here).get_span_context()
        ours: Any = here.get(OURS)
        if ours is None or ours.handle[0] != found:
            if not found.is_valid:
                break
            return here, here, found
        if ours is span.parent or ours.end_ns is None:
            return here, here, found
        here = ours.handle[3]  # its end came on another thread, or in a forked child: it is current here to this day
    if span.parent is not None and span.parent.handle is not None:
        found = span.parent.handle[0]
    elif span.parent_id is not None:
        found = span_context(Link(span.trace_id, span.parent_id), span.sampled, is_remote=span.parent is None)
    else:
        return here, here, trace.get_current_span(here).get_span_context()
    return here, trace.set_span_in_context(trace.NonRecordingSpan(found), here), found


def leave(attached: Context, made: trace.Span, before: Context) -> None:
    """Make `before` current again, where the span's own context is not simply the current one."""
    here = get_current()
    if trace.get_current_span(here) is made:
        attach(before)
        return
    # It ends before a span that was opened within it: when that one ends, this one must not be current again.
    ours: Any = here.get(OURS)
    while ours is not None:
        handle: Handle = ours.handle
        if handle[3] is attached:
            ours.handle = (*handle[:3], before, *handle[4:])
            return
        ours = handle[3].get(OURS)


def span_context(link: Link, sampled: bool = True, is_remote: bool = False) -> trace.SpanContext:
    """OpenTelemetry's name for a span."""
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if sampled else trace.TraceFlags.DEFAULT)
    return trace.SpanContext(int(link.trace_id, 16), int(link.span_id, 16), is_remote, flags)
