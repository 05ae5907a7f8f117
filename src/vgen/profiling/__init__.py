"""Spans, measurements and their sinks. Imports no torch, vLLM, OpenTelemetry or W&B."""

from . import semconv
from .aggregation import Row
from .content_capture import ContentCapture
from .context import ProfilingContext
from .device_timing import DeviceTimer
from .measurement import Instrument, Measurement
from .span_model import Event, Link, Sink, Span, Step

__all__ = [
    "ContentCapture",
    "DeviceTimer",
    "Event",
    "Instrument",
    "Link",
    "Measurement",
    "ProfilingContext",
    "Row",
    "Sink",
    "Span",
    "Step",
    "semconv",
]
