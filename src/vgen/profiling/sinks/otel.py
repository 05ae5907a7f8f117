"""OpenTelemetry: exports vgen's spans and metrics. Spans share the caller's trace and span IDs.

This module needs only the API package. `otel_sdk.py` makes providers for callers who have none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...errors import needs_extra
from .. import semconv
from ..measurement import Attributes, Instrument, Measurement
from ..span_model import Sink, Span, Step

with needs_extra("OTelSink", "OpenTelemetry", "otel"):
    from opentelemetry import trace
    from opentelemetry.context import Context, attach, get_current

from .deadline import within
from .otel_context import CURRENT_SPAN, VGEN_SPAN, Handle, SpanTemplate, parent_context, restore_context, span_context
from .otel_metrics import OTelInstruments

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

SCOPE = "vgen"
MAX_TEMPLATES = 512
"""Span names that are remembered. The caller may use names without bound, for example with a number in them."""
_INTERNAL = trace.SpanKind.INTERNAL


class OTelSink(Sink):
    """Exports spans through `tracer_provider` and metrics through `meter_provider`.

    An open span is also OpenTelemetry's current span: HTTP clients put it into their headers, and spans that the
    caller opens with plain OpenTelemetry become its children, or are its parents. All other sinks record
    OpenTelemetry's IDs, also for traces that OpenTelemetry does not sample. Each measurement goes to an instrument of
    the same name, and the seconds of each span to the histogram `<span name>.duration`; rebuilt spans are left out of
    it, because they are a selection.

    The sink flushes the providers and never shuts them down.

    Args:
        tracer_provider: By default OpenTelemetry's global one.
        meter_provider: By default OpenTelemetry's global one.
        conventions: Other vocabularies to emit in addition: `semconv.GEN_AI`, `semconv.GEN_AI_INFERENCE`, and
            `semconv.RL_EXPERIMENTAL`, which may change at any time.

    Example:
        OTelSink(tracer_provider, meter_provider, conventions=(semconv.GEN_AI_INFERENCE,))
    """

    inline = True  # a span must become current on the thread that does the work
    quiet = True  # a span processor that opens spans would recurse forever with plain OpenTelemetry, too

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        conventions: Iterable[semconv.Convention] = (semconv.GEN_AI,),
    ) -> None:
        conventions = tuple(conventions)
        self._providers = tracer_provider, meter_provider
        self._start_span = trace.get_tracer(SCOPE, __version__, tracer_provider).start_span
        self._metrics = OTelInstruments(meter_provider, SCOPE, __version__, conventions)
        self._names = {name: alias for convention in conventions for name, alias in convention.spans.items()}
        self._attributes = {name: extra for convention in conventions for name, extra in convention.attributes.items()}
        self._templates: dict[str, SpanTemplate] = {}
        self._untimed = self._metrics.idle

    @property
    def lost(self) -> int:
        """Values that OpenTelemetry cannot hold, plus undelivered spans if the provider counts them in `lost`."""
        return self._metrics.refused + getattr(self._providers[0], "lost", 0)

    def identify(self, span: Span) -> bool:
        """Start OpenTelemetry's span and copy its IDs. Returns false if no SDK is set up, so that there are none."""
        here, parent, links = get_current(), span.parent, span.links
        template = self._templates.get(span.name) or self._template(span.name)
        if span.current and (
            (not here and span.parent_id is None)
            if parent is None
            else (parent.handle is not None and parent.handle[2] is here)
        ):
            start, otel_parent = here, None
        else:
            here, start, otel_parent = parent_context(span, here)
        otel_span = self._start_span(
            template.name,
            start,
            _INTERNAL,
            {**span.attributes, **template.attributes} if template.attributes else span.attributes,
            [trace.Link(span_context(link), dict(link.attributes)) for link in links] if links else None,
            span.start_ns + span.offset_ns,
        )
        identity = otel_span.get_span_context()
        attached = None
        if span.current:
            attached = Context({**here, CURRENT_SPAN: otel_span, VGEN_SPAN: span})
            attach(attached)
        handle: Handle = identity, otel_span, attached, here, links, template
        span.handle = handle
        if not otel_span.is_recording() and identity in (
            trace.get_current_span(start).get_span_context(),
            trace.INVALID_SPAN_CONTEXT,
        ):
            return False  # without an SDK the API returns the parent's own context
        span.span_id = identity.span_id.to_bytes(8, "big").hex()
        span.sampled = identity.trace_flags.sampled
        if otel_parent is not None:
            span.parent_id = trace.format_span_id(otel_parent.span_id) if otel_parent.is_valid else None
            span.trace_id = trace.format_trace_id(identity.trace_id)
        elif parent is None:
            span.trace_id = identity.trace_id.to_bytes(16, "big").hex()
        return True

    def on_end(self, span: Span) -> None:
        handle: Handle | None = span.handle
        if handle is None or span.end_ns is None:
            return  # OpenTelemetry's span could not be started
        identity, otel_span, attached, before, links, template = handle
        if otel_span is None:
            return
        error, end_time = span.error, span.end_ns + span.offset_ns
        record_duration = template.record_duration
        if record_duration is not None and (attached is not None or semconv.REBUILT not in span.attributes):
            record_duration((span.end_ns - span.start_ns) / 1e9, span.attributes, error, attached or before)
        if attached is not None:
            if get_current() is attached:
                attach(before)
            else:
                restore_context(attached, otel_span, before)
        span.handle = identity, None, None, before, (), template
        if not otel_span.is_recording():
            return
        if span.attributes is not span.inherited:
            inherited = span.inherited
            otel_span.set_attributes({k: v for k, v in span.attributes.items() if inherited.get(k) is not v})
        for event in span.events:
            otel_span.add_event(event.name, dict(event.attributes), event.time_ns + span.offset_ns)
        if span.links is not links:
            for link in span.links[len(links) :]:
                otel_span.add_link(span_context(link), dict(link.attributes))
        if error is not None:
            otel_span.set_attribute(semconv.ERROR_TYPE, error)
            otel_span.add_event(semconv.EXCEPTION_EVENT, {semconv.EXCEPTION: error}, end_time)
            otel_span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        otel_span.end(end_time)

    def _template(self, name: str) -> SpanTemplate:
        otel_name = self._names.get(name, name)
        record_duration = None if self._untimed else self._metrics.timer(otel_name)
        template = SpanTemplate(otel_name, self._attributes.get(name), record_duration)
        if len(self._templates) < MAX_TEMPLATES or name in semconv.SPANS:
            self._templates[name] = template
        return template

    def on_measurement(self, measurement: Measurement) -> None:
        self._metrics.record(measurement)

    def on_step(self, step: Step) -> None:
        if self._untimed and not self._metrics.idle:  # the caller has set a global provider meanwhile
            self._untimed = False
            self._templates.clear()

    def on_observe(self, instrument: Instrument, read: Callable[[], float | None], attributes: Attributes) -> None:
        self._metrics.observe(instrument, read, attributes)

    def flush(self, timeout: float) -> None:
        flushes: list[Any] = [getattr(provider, "force_flush", None) for provider in self._providers]
        # `within`, because the SDK's providers may ignore this timeout and wait far longer for the collector.
        calls = [functools.partial(flush, int(timeout * 1000)) for flush in flushes if flush is not None]
        if not within(timeout, *calls):
            raise TimeoutError(f"OpenTelemetry's providers did not flush within {timeout:.1f} s")

    def close(self, timeout: float) -> None:
        try:
            self.flush(timeout)  # and no shutdown: the providers belong to the caller
        finally:
            self._metrics.close()
