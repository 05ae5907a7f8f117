"""PromQL expressions as text."""

from __future__ import annotations

import pytest

from vgen.dashboards import promql
from vgen.profiling.span_model import Instrument

SECONDS = Instrument("vgen.a.seconds", "histogram", "s")
COUNT = Instrument("vgen.b", "counter", "{token}")
WHERE = ('job="x"',)


def test_a_series_has_the_exporters_name_and_its_matchers():
    assert promql.series(COUNT, WHERE) == 'vgen_b_total{job="x"}'
    assert promql.series(COUNT, ()) == "vgen_b_total"
    assert promql.series(SECONDS, WHERE, "bucket") == 'vgen_a_seconds_bucket{job="x"}'


@pytest.mark.parametrize(("instrument", "part"), [(COUNT, "sum"), (SECONDS, "")])
def test_a_part_that_does_not_fit_the_kind_is_refused(instrument: Instrument, part: str):
    with pytest.raises(ValueError, match="does not fit"):
        promql.series(instrument, WHERE, part)


def test_a_quantile_adds_up_buckets_and_a_mean_divides_sums():
    rate = 'sum by (le, vgen_engine) (rate(vgen_a_seconds_bucket{job="x"}[5m]))'
    assert promql.quantile(0.5, SECONDS, "vgen.engine", where=WHERE, window="5m") == f"histogram_quantile(0.5, {rate})"
    parts = [f'sum(rate(vgen_a_seconds_{part}{{job="x"}}[5m]))' for part in ("sum", "count")]
    assert promql.mean(SECONDS, where=WHERE, window="5m") == " / ".join(parts)


def test_a_legend_is_the_text_and_the_labels():
    assert promql.legend("vgen.engine", "instance", text="p99") == "p99 {{vgen_engine}} {{instance}}"
    assert promql.legend(text="p99") == "p99"
