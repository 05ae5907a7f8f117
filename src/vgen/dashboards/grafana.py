"""The dashboard as Grafana's JSON, made with the builders of Grafana's Foundation SDK."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from ..errors import MissingExtraError
from ..profiling import semconv
from . import vllm
from .panels import PROCESS, Panel, dashboard
from .promql import series

try:
    from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, statetimeline, timeseries
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import common as kinds
    from grafana_foundation_sdk.models import dashboard as models
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat
except ImportError as error:
    raise MissingExtraError("vgen dashboards", "Grafana's foundation SDK", "dashboards") from error

UID = "vgen"
JAEGER = "http://localhost:16686"
"""The default of the dashboard's variable for Jaeger's address, as the user's browser reaches it."""
HEIGHT = 8
_STATE_COLORS = ("green", "blue", "yellow", "orange", "purple", "red", "super-light-blue", "dark-red", "text")


def dashboard_json() -> str:
    """The whole dashboard as JSON text, for Grafana's provisioning or its import page."""
    made = (
        build.Dashboard("vgen: rollouts, weight syncs and sleep")
        .uid(UID)
        .description("Made by `vgen dashboards`. To change it, change vgen's panels and write the files again.")
        .tags(["vgen", "generated"])
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
    )
    for variable in _variables():
        made.with_variable(variable)
    made.link(_link("Jaeger", f"${{jaeger}}/search?service=${{job}}&{_RANGE}"))
    for row in dashboard():
        made.with_row(build.Row(row.title))
        for panel in row.panels:
            made.with_panel(_panel(panel))
    built = made.build()
    for number, panel in enumerate(built.panels or [], 1):
        panel.id_val = number
    return json.dumps(json.loads(JSONEncoder().encode(built)), indent=2) + "\n"


def _variables() -> list[Any]:
    def query(name: str, label: str, expression: str, *, several: bool) -> build.QueryVariable:
        made = build.QueryVariable(name).label(label).datasource(_DATASOURCE).query(expression)
        made.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
        return made.multi(True).include_all(True).all_value(".*") if several else made

    step = series(semconv.duration(semconv.STEP), (), part="count")
    of_run = series(semconv.duration(semconv.STEP), ('job="$job"',), part="count")
    return [
        build.DatasourceVariable("datasource").label("Prometheus").type("prometheus"),
        query("job", "Run", f"label_values({step}, job)", several=False),
        query("instance", "Process", f"label_values({of_run}, {PROCESS})", several=True),
        query("server", "vLLM server", f"label_values({series(vllm.RUNNING, ())}, {vllm.SERVER})", several=True),
        build.CustomVariable("window").label("Window").values("5m,1m,15m,1h").current(_option("5m")),
        build.TextBoxVariable("jaeger").label("Jaeger").default_value(JAEGER).current(_option(JAEGER)),
    ]


def _option(value: str) -> models.VariableOption:
    return models.VariableOption(selected=True, text=value, value=value)


_DATASOURCE = kinds.DataSourceRef(type_val="prometheus", uid="${datasource}")
_RANGE = "start=${__from}000&end=${__to}000&lookback=custom&limit=20"
"""The time range for Jaeger in microseconds. Grafana's variables are milliseconds, hence the zeros."""


def _link(title: str, url: str) -> build.DashboardLink:
    return build.DashboardLink(title).type(models.DashboardLinkType.LINK).url(url).target_blank(True)


def traces(span: str, *, failed: bool = False) -> str:
    """The address of a Jaeger search for traces with this span, in the time range that the dashboard shows."""
    tags = "&tags=" + quote(json.dumps({"error": "true"})) if failed else ""
    return f"${{jaeger}}/search?service=${{job}}&operation={quote(span)}{tags}&{_RANGE}"


def _panel(panel: Panel) -> Any:
    made = _KINDS[panel.kind](panel)
    made.title(panel.title).description(panel.description).unit(panel.unit).datasource(_DATASOURCE)
    made.span(panel.width).height(HEIGHT if panel.kind != "number" else HEIGHT // 2)
    for number, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expression).ref_id(chr(ord("A") + number)).datasource(_DATASOURCE)
        target.legend_format(query.legend or "__auto")
        if panel.kind == "heatmap":
            target.format(PromQueryFormat.HEATMAP)
        # Exemplars are dots for traced calls. With metrics by OTLP, each dot links to its trace.
        made.with_target(target.exemplar("_bucket{" in query.expression))
    if panel.span is not None:
        title = f"Traces with {'a failed ' if panel.failed else ''}{panel.span}"
        made.links([_link(title, traces(panel.span, failed=panel.failed))])
    return made


def _lines(panel: Panel) -> Any:
    made = timeseries.Panel().min(0).fill_opacity(10).show_points(kinds.VisibilityMode.AUTO).span_nulls(True)
    made.tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
    if panel.kind == "stack":
        made.fill_opacity(40).stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL).group("A"))
    return made


def _number(panel: Panel) -> Any:
    latest = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().reduce_options(latest).graph_mode(kinds.BigValueGraphMode.AREA).no_value("–")


def _states(panel: Panel) -> Any:
    results = {
        str(value): models.ValueMappingResult(text=state, color=_STATE_COLORS[value], index=value)
        for value, state in enumerate(panel.states)
    }
    return statetimeline.Panel().mappings([models.ValueMap(options=results)]).merge_values(True).fill_opacity(80)


def _heatmap(panel: Panel) -> Any:
    return heatmap.Panel().y_axis(heatmap.YAxisConfig().unit(panel.unit)).hide_legend()


_KINDS: dict[str, Callable[[Panel], Any]] = {
    "lines": _lines,
    "stack": _lines,
    "number": _number,
    "states": _states,
    "heatmap": _heatmap,
}
