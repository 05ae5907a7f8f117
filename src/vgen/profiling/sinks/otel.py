"""OpenTelemetry: vgen's spans become OpenTelemetry's, in one id space with the caller's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import MissingExtraError
from .. import names
from ..records import Sink, Span

try:
    from opentelemetry import context as otel_context
    from opentelemetry import trace
except ImportError as error:
    raise MissingExtraError("OTelSink", "OpenTelemetry", "otel") from error

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import TracerProvider

SCOPE = "vgen"


class OTelSink(Sink):
    """Exports spans through `tracer_provider`, by default the global one. vgen sets up no provider of its own.

    An open span is OpenTelemetry's current span too: HTTP clients put it into their headers, spans that
    the caller opens with plain OpenTelemetry lie beneath it, and it lies beneath theirs. All other sinks
    record OpenTelemetry's ids.
    """

    inline = True  # a span must be made current on the thread that does the work

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        from ... import __version__

        self._provider = tracer_provider
        self._tracer = trace.get_tracer(SCOPE, __version__, tracer_provider)
        self._open: dict[str, tuple[trace.Span, Context | None]] = {}

    def identify(self, span: Span) -> None:
        """Start OpenTelemetry's span and give vgen's its ids."""
        here = otel_context.get_current()
        above = here if span.current else self._beneath(span, here)
        parent = trace.get_current_span(above).get_span_context()
        if not parent.is_valid and span.parent_id is not None:
            above = trace.set_span_in_context(_remote(span.trace_id, span.parent_id), above)
            parent = trace.get_current_span(above).get_span_context()
        made = self._tracer.start_span(
            span.name,
            context=above,
            attributes=span.attributes,
            links=[trace.Link(_context(k.trace_id, k.span_id), dict(k.attributes)) for k in span.links],
            start_time=span.start_unix_ns,
        )
        own = made.get_span_context()
        # Without an SDK the API hands back the parent's own context: then vgen's ids stay.
        if own.is_valid and own.span_id != parent.span_id:
            span.trace_id = trace.format_trace_id(own.trace_id)
            span.span_id = trace.format_span_id(own.span_id)
            span.parent_id = trace.format_span_id(parent.span_id) if parent.is_valid else None
        if span.current:
            otel_context.attach(trace.set_span_in_context(made, here))
        self._open[span.span_id] = (made, here if span.current else None)

    def on_end(self, span: Span) -> None:
        made, before = self._open.pop(span.span_id)
        # Going back by attaching what was current, not by a token: a token of another task logs an error.
        if before is not None and trace.get_current_span() is made:
            otel_context.attach(before)
        if not made.is_recording():
            return
        if span.attributes is not span.inherited:
            made.set_attributes({k: v for k, v in span.attributes.items() if span.inherited.get(k) is not v})
        for event in span.events:
            made.add_event(event.name, dict(event.attributes), event.time_ns + span.offset_ns)
        for link in span.links[len(getattr(made, "links", ())) :]:
            made.add_link(_context(link.trace_id, link.span_id), dict(link.attributes))
        if span.error is not None:
            made.set_attribute(names.ERROR_TYPE, span.error)
            made.add_event("exception", {names.EXCEPTION: span.error}, span.end_unix_ns)
            made.set_status(trace.Status(trace.StatusCode.ERROR, span.error))
        made.end(span.end_unix_ns)

    def flush(self, timeout: float) -> None:
        flush: Any = getattr(self._provider, "force_flush", None)
        if flush is not None:
            flush(int(timeout * 1000))

    def close(self, timeout: float) -> None:
        self.flush(timeout)  # the provider is the caller's: it is not ours to shut down

    def _beneath(self, span: Span, here: Context) -> Context:
        parent = span.parent
        held = self._open.get(parent.span_id) if parent is not None else None
        if held is not None:
            return trace.set_span_in_context(held[0], here)
        if parent is not None:
            return trace.set_span_in_context(_remote(parent.trace_id, parent.span_id), here)
        return here


def _context(trace_id: str, span_id: str, is_remote: bool = False) -> trace.SpanContext:
    sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
    return trace.SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, sampled)


def _remote(trace_id: str, span_id: str) -> trace.Span:
    return trace.NonRecordingSpan(_context(trace_id, span_id, is_remote=True))
