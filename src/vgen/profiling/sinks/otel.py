"""OpenTelemetry: vgen's spans and metrics become OpenTelemetry's, in one id space with the caller's own.

Knows the API package alone. Who brings no providers of their own finds them made in `otel_sdk.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ...errors import MissingExtraError
from .. import names
from ..records import Attributes, Instrument, Link, Measurement, Sink, Span, Step

try:
    from opentelemetry import trace
    from opentelemetry.context import Context, attach, create_key, get_current
except ImportError as error:
    raise MissingExtraError("OTelSink", "OpenTelemetry", "otel") from error

from .deadline import within
from .otel_metrics import OTelInstruments, Timer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

SCOPE = "vgen"
MAX_PLANS = 512
"""Span names that are remembered. A name with a number in it has no bound."""

_OURS = create_key("vgen-span")
_CURRENT: str = next(iter(trace.set_span_in_context(trace.INVALID_SPAN, Context())))
"""OpenTelemetry's key of the current span, so that a context with both keys is made in one go."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What becomes of the spans of one name."""

    name: str
    extra: Mapping[str, Any] | None
    time: Timer | None


_NOBODY = trace.INVALID_SPAN_CONTEXT
_INTERNAL = trace.SpanKind.INTERNAL

_Handle: TypeAlias = "tuple[trace.SpanContext, trace.Span | None, Context | None, Context, Sequence[Link], _Plan]"
"""A span's own context; OpenTelemetry's span while it is open, and the context in which it was made current; the
context before that; the links that it was opened with."""


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
        self._plans: dict[str, _Plan] = {}
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
            above, foreign = here, None
        else:
            here, above, foreign = _above(span, here)
        made = self._start(
            plan.name,
            above,
            _INTERNAL,
            {**span.attributes, **plan.extra} if plan.extra else span.attributes,
            [trace.Link(_context(link), dict(link.attributes)) for link in links] if links else None,
            span.start_ns + span.offset_ns,
        )
        own = made.get_span_context()
        attached = None
        if span.current:
            attached = Context({**here, _CURRENT: made, _OURS: span})
            attach(attached)
        handle: _Handle = own, made, attached, here, links, plan
        span.handle = handle
        if not made.is_recording() and own in (trace.get_current_span(above).get_span_context(), _NOBODY):
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
        handle: _Handle = span.handle
        own, made, attached, before, links, plan = handle
        if made is None or span.end_ns is None:
            return
        error, end_time = span.error, span.end_ns + span.offset_ns
        if attached is not None:
            if plan.time is not None:
                plan.time((span.end_ns - span.start_ns) / 1e9, span.attributes, error)
            if get_current() is attached:
                attach(before)
            else:
                _leave(attached, made, before)
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
                made.add_link(_context(link), dict(link.attributes))
        if error is not None:
            made.set_attribute(names.ERROR_TYPE, error)
            made.add_event(names.EXCEPTION_EVENT, {names.EXCEPTION: error}, end_time)
            made.set_status(trace.Status(trace.StatusCode.ERROR, error))
        made.end(end_time)

    def _plan(self, name: str) -> _Plan:
        shown = self._names.get(name, name)
        plan = _Plan(shown, self._extra.get(name), None if self._untimed else self._metrics.timer(shown))
        if len(self._plans) < MAX_PLANS:
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


def _above(span: Span, here: Context) -> tuple[Context, Context, trace.SpanContext]:
    """What a new span lies beneath, where it is not simply OpenTelemetry's current span.

    That is: the context to go back to in the end, the one to start in, the span that is current in it. A
    span of the caller's own that is current goes before vgen's tree.
    """
    while span.current:
        found = trace.get_current_span(here).get_span_context()
        ours: Any = here.get(_OURS)
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
        found = _context(Link(span.trace_id, span.parent_id), span.sampled, is_remote=span.parent is None)
    else:
        return here, here, trace.get_current_span(here).get_span_context()
    return here, trace.set_span_in_context(trace.NonRecordingSpan(found), here), found


def _leave(attached: Context, made: trace.Span, before: Context) -> None:
    """Make `before` current again, where the span's own context is not simply the current one."""
    here = get_current()
    if trace.get_current_span(here) is made:
        attach(before)
        return
    # It ends before a span that was opened within it: when that one ends, this one must not be current again.
    ours: Any = here.get(_OURS)
    while ours is not None:
        handle: _Handle = ours.handle
        if handle[3] is attached:
            ours.handle = (*handle[:3], before, *handle[4:])
            return
        ours = handle[3].get(_OURS)


def _context(link: Link, sampled: bool = True, is_remote: bool = False) -> trace.SpanContext:
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if sampled else trace.TraceFlags.DEFAULT)
    return trace.SpanContext(int(link.trace_id, 16), int(link.span_id, 16), is_remote, flags)
