"""OpenTelemetry: vgen's spans and metrics become OpenTelemetry's, in one id space with the caller's own.

Knows the API package alone. Who brings no providers of their own finds them made in `otel_sdk.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import MissingExtraError
from .. import names
from ..records import Attributes, Instrument, Measurement, Sink, Span, Step

try:
    from opentelemetry import trace
    from opentelemetry.context import Context, attach, get_current
except ImportError as error:
    raise MissingExtraError("OTelSink", "OpenTelemetry", "otel") from error

from .deadline import within
from .otel_context import CURRENT, OURS, Handle, above, leave, span_context
from .otel_metrics import OTelInstruments, Timer

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

SCOPE = "vgen"
MAX_PLANS = 512
"""Span names that are remembered. A name with a number in it has no bound."""
_INTERNAL = trace.SpanKind.INTERNAL


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of the spans of one name."""

    name: str
    extra: Mapping[str, Any] | None
    time: Timer | None


class OTelSink(Sink):
    """Exports spans through `tracer_provider` and metrics through `meter_provider`, by default the global ones.

    An open span is OpenTelemetry's current span too: HTTP clients put it into their headers, spans that
    the caller opens with plain OpenTelemetry lie beneath it, and it lies beneath theirs. All other sinks
    record OpenTelemetry's ids, also where it samples a trace out. Every measurement goes to an instrument
    of its name, and each span's seconds to the histogram `<span name>.duration`, except those of spans
    rebuilt afterwards: they are a selection.

    `conventions` are other vocabularies to speak besides: `names.GEN_AI`, and for the brave
    `names.RL_EXPERIMENTAL`. The providers stay the caller's: the sink flushes them and shuts nothing down.
    """

    inline = True  # a span must be made current on the thread that does the work
    quiet = True  # a span processor that opens spans would never come to an end with plain OpenTelemetry either

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        conventions: Iterable[names.Convention] = (names.GEN_AI,),
    ) -> None:
        from ... import __version__

        conventions = tuple(conventions)
        self._providers = tracer_provider, meter_provider
        self._start = trace.get_tracer(SCOPE, __version__, tracer_provider).start_span
        self._metrics = OTelInstruments(meter_provider, SCOPE, __version__, conventions)
        self._names = {own: theirs for convention in conventions for own, theirs in convention.spans.items()}
        self._extra = {name: extra for convention in conventions for name, extra in convention.attributes.items()}
        self._plans: dict[str, Plan] = {}
        self._untimed = self._metrics.idle

    @property
    def lost(self) -> int:
        """Values that OpenTelemetry cannot hold, and undelivered spans where the provider counts them, as vgen's do."""
        return self._metrics.refused + getattr(self._providers[0], "lost", 0)

    def identify(self, span: Span) -> bool:
        """Start OpenTelemetry's span and give vgen's its ids. False without an SDK: then there are none."""
        here, parent, links = get_current(), span.parent, span.links
        plan = self._plans.get(span.name) or self._plan(span.name)
        if span.current and (
            (not here and span.parent_id is None)
            if parent is None
            else (parent.handle is not None and parent.handle[2] is here)
        ):
            start, foreign = here, None
        else:
            here, start, foreign = above(span, here)
        made = self._start(
            plan.name,
            start,
            _INTERNAL,
            {**span.attributes, **plan.extra} if plan.extra else span.attributes,
            [trace.Link(span_context(link), dict(link.attributes)) for link in links] if links else None,
            span.start_ns + span.offset_ns,
        )
        own = made.get_span_context()
        attached = None
        if span.current:
            attached = Context({**here, CURRENT: made, OURS: span})
            attach(attached)
        handle: Handle = own, made, attached, here, links, plan
        span.handle = handle
        if not made.is_recording() and own in (
            trace.get_current_span(start).get_span_context(),
            trace.INVALID_SPAN_CONTEXT,
        ):
            return False  # without an SDK the API hands back the parent's own context
        span.span_id = own.span_id.to_bytes(8, "big").hex()
        span.sampled = own.trace_flags.sampled
        if foreign is not None:
            span.parent_id = trace.format_span_id(foreign.span_id) if foreign.is_valid else None
            span.trace_id = trace.format_trace_id(own.trace_id)
        elif parent is None:
            span.trace_id = own.trace_id.to_bytes(16, "big").hex()
        return True

    def on_end(self, span: Span) -> None:
        handle: Handle | None = span.handle
        if handle is None or span.end_ns is None:
            return  # it could not be started
        own, made, attached, before, links, plan = handle
        if made is None:
            return
        error, end_time = span.error, span.end_ns + span.offset_ns
        if plan.time is not None and (attached is not None or names.REBUILT not in span.attributes):
            plan.time((span.end_ns - span.start_ns) / 1e9, span.attributes, error, attached or before)
        if attached is not None:
            if get_current() is attached:
                attach(before)
            else:
                leave(attached, made, before)
        span.handle = own, None, None, before, (), plan
        if not made.is_recording():
            return
        if span.attributes is not span.inherited:
            inherited = span.inherited
            made.set_attributes({k: v for k, v in span.attributes.items() if inherited.get(k) is not v})
        for event in span.events:
            made.add_event(event.name, dict(event.attributes), event.time_ns + span.offset_ns)
        if span.links is not links:
            for link in span.links[len(links) :]:
                made.add_link(span_context(link), dict(link.attributes))
        if error is not None:
            made.set_attribute(names.ERROR_TYPE, error)
            made.add_event(names.EXCEPTION_EVENT, {names.EXCEPTION: error}, end_time)
            made.set_status(trace.Status(trace.StatusCode.ERROR, error))
        made.end(end_time)

    def _plan(self, name: str) -> Plan:
        shown = self._names.get(name, name)
        plan = Plan(shown, self._extra.get(name), None if self._untimed else self._metrics.timer(shown))
        if len(self._plans) < MAX_PLANS or name in names.SPANS:
            self._plans[name] = plan
        return plan

    def on_measurement(self, measurement: Measurement) -> None:
        self._metrics.record(measurement)

    def on_step(self, step: Step) -> None:
        if self._untimed and not self._metrics.idle:  # a global provider has been set since
            self._untimed = False
            self._plans.clear()

    def on_observe(self, instrument: Instrument, read: Callable[[], float | None], attributes: Attributes) -> None:
        self._metrics.observe(instrument, read, attributes)

    def flush(self, timeout: float) -> None:
        flushes: list[Any] = [getattr(provider, "force_flush", None) for provider in self._providers]
        # The SDK's own may ignore the time that they are given, and wait for the collector far longer.
        calls = [functools.partial(flush, int(timeout * 1000)) for flush in flushes if flush is not None]
        if not within(timeout, *calls):
            raise TimeoutError(f"OpenTelemetry's providers did not flush within {timeout:.1f} s")

    def close(self, timeout: float) -> None:
        try:
            self.flush(timeout)  # no more: the providers are the caller's
        finally:
            self._metrics.close()
