"""All telemetry names that vgen may emit, in its own vocabulary and in others."""

from __future__ import annotations

from vgen.profiling import semconv

CONVENTIONS = (semconv.GEN_AI, semconv.GEN_AI_INFERENCE, semconv.RL_EXPERIMENTAL)
KNOWN = {
    *(*semconv.SPANS, *semconv.METRICS, *semconv.ATTRIBUTES, *semconv.EVENTS, *semconv.RESOURCE),
    *(alias.instrument.name for convention in CONVENTIONS for alias in convention.metrics),
    *(name for convention in CONVENTIONS for name in convention.spans.values()),
}
