"""All queries of the dashboard and of its page, and what Prometheus has to answer them with."""

from __future__ import annotations

import re
from pathlib import Path

from vgen.dashboards import vllm
from vgen.dashboards.panels import dashboard
from vgen.dashboards.promql import label
from vgen.profiling import semconv
from vgen.profiling.measurement import Instrument
from vgen.profiling.semconv_docs import prometheus_name

EVERY_EXPRESSION = tuple(
    dict.fromkeys(query.expression for row in dashboard() for panel in row.panels for query in panel.queries)
)
PAGE = Path(__file__).parents[2] / "docs" / "dashboards.md"
OF_THE_PAGE = tuple(query.strip() for query in re.findall(r"^```promql\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
_VLLM = [value for value in vars(vllm).values() if isinstance(value, Instrument)]
_OURS = [*semconv.METRICS.values(), *(semconv.duration(name) for name in semconv.SPANS if name not in semconv.SELECTED)]


def _exposed() -> dict[str, set[str]]:
    found = {"target_info": {"job", "instance", label(semconv.RANK)}}
    for metric in [*_OURS, *_VLLM]:
        for part in ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",):
            found[prometheus_name(metric) + part] = {"job", "instance", *map(label, metric.attributes)}
    return found


EXPOSED = _exposed()
"""The labels of each series that a vgen process or a vLLM server exposes, by its name."""


def filled(expression: str, job: str = ".*", window: str = "5m") -> str:
    """The query as Grafana sends it, its variables replaced."""
    expression = re.sub(r'job="(\$job|grpo)"', f'job=~"{job}"', expression).replace("$__rate_interval", window)
    return expression.replace("$instance", ".*").replace("$server", ".*").replace("$window", window)
