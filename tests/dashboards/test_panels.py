"""The content of the dashboard, as plain data."""

from __future__ import annotations

from collections import Counter

from vgen.dashboards.panels import dashboard, metric, percentiles
from vgen.profiling import semconv


def test_titles_are_unique_in_their_row_and_rows_fill_24_columns():
    for row in dashboard():
        titles = Counter(panel.title for panel in row.panels)
        assert max(titles.values()) == 1, titles
        width = 0
        for panel in row.panels:
            assert panel.width <= 24
            width = width + panel.width if width + panel.width <= 24 else panel.width
        assert width in (8, 16, 24), row.title


def test_a_panel_of_a_metric_has_its_description_and_unit():
    panel = metric("Leaked", semconv.LEAKED_TOTAL, "x", "{{y}}", span=semconv.SLEEP)
    assert (panel.description, panel.unit) == (semconv.LEAKED_TOTAL.description, "bytes")
    assert [(query.expression, query.legend) for query in panel.queries] == [("x", "{{y}}")]
    assert metric("Sent", semconv.SYNCED_BYTES, "x", unit="Bps").unit == "Bps"


def test_percentiles_are_one_query_each():
    panel = percentiles("Request", semconv.REQUEST_E2E, semconv.ENGINE, at=(0.5, 0.99))
    assert panel.unit == "s"
    assert [query.legend for query in panel.queries] == ["p50 {{vgen_engine_kind}}", "p99 {{vgen_engine_kind}}"]
    assert [query.expression[:23] for query in panel.queries] == ["histogram_quantile(0.5,", "histogram_quantile(0.99"]


def test_only_a_panel_of_states_has_names_for_values():
    for row in dashboard():
        for panel in row.panels:
            assert bool(panel.states) == (panel.kind == "states")
