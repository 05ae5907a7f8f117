"""The dashboard: JSON that Grafana knows, queries about metrics that exist, links to spans that exist."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from helpers.expressions import EVERY_EXPRESSION, EXPOSED, OF_THE_PAGE, filled
from helpers.scraper import needs_promtool

from vgen.dashboards.grafana import dashboard_json
from vgen.profiling import semconv
from vgen.profiling.semconv_docs import prometheus_name

KNOWN_PANELS = {"row", "stat", "timeseries", "heatmap", "state-timeline"}


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return json.loads(dashboard_json())


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_grafanas_sdk_reads_it_and_writes_the_same(board: dict[str, Any]):
    register_default_plugins()
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(json.dumps(board)))))
    assert again == board


def test_each_panel_says_what_it_shows_and_has_its_place(board: dict[str, Any]):
    assert {panel["type"] for panel in board["panels"]} <= KNOWN_PANELS
    assert max(Counter(panel["id"] for panel in board["panels"]).values()) == 1
    cells = Counter(
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    )
    assert max(cells.values()) == 1  # none lies over another
    assert max(x for x, _ in cells) == 23
    for panel in panels(board):
        assert panel["title"]
        assert panel["description"].endswith((".", "`"))
        assert [target["refId"] for target in panel["targets"]] == sorted({t["refId"] for t in panel["targets"]})


def test_every_metric_of_vgens_is_shown():
    shown = set(re.findall(r"vgen_\w+", " ".join(EVERY_EXPRESSION)))
    for metric in semconv.METRICS.values():
        parts = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        assert shown & {prometheus_name(metric) + part for part in parts}, metric.name


@pytest.mark.parametrize("expression", [*EVERY_EXPRESSION, *OF_THE_PAGE])
def test_each_query_asks_for_metrics_and_labels_that_exist(expression: str):
    asked = re.findall(r"([a-zA-Z_:]\w*(?::\w+)?){([^}]*)}", expression)
    assert asked
    for metric, where in asked:
        assert metric in EXPOSED, metric
        matched = set(re.findall(r"(\w+)[=!]", where))
        assert matched <= EXPOSED[metric], matched
    for by in re.findall(r"by \(([^)]*)\)", expression):
        for metric, _ in asked:
            assert set(by.split(", ")) <= EXPOSED[metric] | {"le"}, by


@needs_promtool
def test_promtool_understands_each_query(tmp_path: Path):
    rules = [
        {"record": f"q{number}", "expr": filled(expression)}
        for number, expression in enumerate([*EVERY_EXPRESSION, *OF_THE_PAGE])
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_links_search_jaeger_for_spans_that_exist(board: dict[str, Any]):
    links = [link["url"] for panel in panels(board) for link in panel.get("links", [])]
    assert len(links) > 15
    for link in links:
        asked = parse_qs(urlsplit(link).query)
        assert link.startswith("${jaeger}/search?")
        assert asked["service"] == ["${job}"]
        assert asked["operation"][0] in semconv.SPANS
        assert asked["start"] == ["${__from}000"]
    [failed] = {link for link in links if "tags=" in link}
    assert json.loads(parse_qs(urlsplit(failed).query)["tags"][0]) == {"error": "true"}


def test_quantiles_ask_for_the_traces_behind_them(board: dict[str, Any]):
    for panel in panels(board):
        for target in panel["targets"]:
            assert target["exemplar"] == ("_bucket{" in target["expr"])


def test_each_variable_that_a_query_uses_is_one_of_the_dashboards(board: dict[str, Any]):
    used = set(re.findall(r"\$\{?(?!__)(\w+)", json.dumps([*panels(board), board["links"]])))
    assert used == {variable["name"] for variable in board["templating"]["list"]}
