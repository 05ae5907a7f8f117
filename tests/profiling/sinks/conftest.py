"""What the tests of the OpenTelemetry sink share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def traced():
    """A context over an OpenTelemetry SDK of its own."""
    from helpers.otel_tracing import Traced

    return Traced()


@pytest.fixture
def nothing_is_left_current() -> Iterator[None]:
    """Starts with an empty OpenTelemetry context, and checks that the test leaves none behind."""
    from opentelemetry import context

    context.attach(context.Context())
    yield
    assert not context.get_current()


@pytest.fixture
def fast_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry's SDK exports after milliseconds, not after seconds."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "5")
