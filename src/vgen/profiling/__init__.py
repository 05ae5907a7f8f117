"""Spans, measurements and their sinks. Knows nothing of torch, vLLM, OpenTelemetry or W&B."""

from . import names
from .context import ProfilingContext
from .records import Event, Instrument, Link, Measurement, Sink, Span, Step

__all__ = ["Event", "Instrument", "Link", "Measurement", "ProfilingContext", "Sink", "Span", "Step", "names"]
