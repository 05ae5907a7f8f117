"""`docs/dashboards.md` speaks of what is there: panels, spans, alerts, options, files."""

from __future__ import annotations

import re

import pytest
from helpers.expressions import OF_THE_PAGE, PAGE

from vgen.cli import main
from vgen.dashboards import alerts, stack
from vgen.dashboards.files import files
from vgen.dashboards.panels import dashboard
from vgen.profiling import semconv

TEXT = PAGE.read_text()


def test_each_question_has_a_query_a_search_or_a_command():
    questions = re.split(r"^### ", TEXT, flags=re.M)[1:]
    assert [question[0] for question in questions[:5]] == list("12345")
    for question in questions[:5]:
        assert "```promql" in question
        assert "Jaeger" in question
    assert len(OF_THE_PAGE) == 6


def test_panels_and_rows_that_it_names_are_the_dashboards():
    titles = {panel.title for row in dashboard() for panel in row.panels} | {row.title for row in dashboard()}
    named = set(re.findall(r"(?:[Pp]anels?|row|in|and) \*([A-Z][^*]+)\*", TEXT)) - {"Min Duration"}
    assert len(named) > 4
    assert named <= titles


def test_spans_and_attributes_that_it_names_exist():
    known = {*semconv.SPANS, *semconv.ATTRIBUTES, *semconv.METRICS}
    named = set(re.findall(r"`((?:vgen|train)\.[\w.]+)`", TEXT))
    assert {"vgen.stall", "train.step", "vgen.weight_sync"} <= named
    assert named <= known


def test_its_table_of_alerts_is_whole():
    assert set(re.findall(r"^\| `(Vgen\w+)`", TEXT, re.M)) == {alert.name for alert in alerts.alerts()}


def test_files_and_ports_that_it_names_are_those_of_the_stack():
    for path in re.findall(r"monitoring/([\w/.-]+)", TEXT):
        assert path in files()
    ports = {int(port) for port in re.findall(r"localhost:(\d+)", TEXT)}
    assert ports == {stack.OTLP_HTTP, stack.GRAFANA, stack.JAEGER, stack.PROMETHEUS}


@pytest.mark.parametrize("line", re.findall(r"^vgen (.*?)(?: +#.*)?$", TEXT, re.M))
def test_its_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch):
    """Each is parsed whole; what it would do is tested elsewhere."""
    import vgen.cli

    seen: list[str] = []
    monkeypatch.setattr(vgen.cli, "_run", lambda options: seen.append(options.command) or 0)
    assert main(line.split()) == 0
    assert seen == [line.split()[0]]
