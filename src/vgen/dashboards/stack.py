"""An OpenTelemetry collector, Jaeger, Prometheus and Grafana that work together: `docker compose up` in the folder.

The training process sends metrics and spans to the collector over OTLP. The collector sends spans to Jaeger.
Prometheus scrapes the metrics from the collector, with exemplars that hold trace IDs. Grafana has Prometheus and
Jaeger as data sources, and the dashboard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .grafana import UID

IMAGES = {
    "collector": "otel/opentelemetry-collector-contrib:0.157.0",
    "jaeger": "jaegertracing/jaeger:2.19.0",
    "prometheus": "prom/prometheus:v3.13.1",
    "grafana": "grafana/grafana:13.1.0",
}
"""The versions that the OpenTelemetry project runs together in its demo."""

OTLP_GRPC, OTLP_HTTP, COLLECTED, JAEGER, PROMETHEUS, GRAFANA, VLLM = 4317, 4318, 8889, 16686, 9090, 3000, 8000
HOST = "host.docker.internal"
"""The host machine's name inside a container."""
DASHBOARDS = "/var/lib/grafana/dashboards"
"""The dashboard's folder inside Grafana's container."""
EVERY = "15s"
EXEMPLAR = "trace_id"
"""The exemplar's label in which the collector puts the trace ID."""

COMPOSE, COLLECTOR, SCRAPES, RULES = "compose.yaml", "otel-collector.yaml", "prometheus/prometheus.yaml", "rules.yaml"
VLLM_TARGETS, SOURCES, PROVIDERS = "vllm-targets.yaml", "datasources/vgen.yaml", "dashboards/vgen.yaml"


def compose() -> dict[str, Any]:
    """`compose.yaml`. No service asks for a password, so ports are open only to this machine unless `BIND` is set."""
    grafana = {
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Admin",
        "GF_AUTH_DISABLE_LOGIN_FORM": "true",
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": f"{DASHBOARDS}/{UID}.json",
    }
    prometheus = ["config.file=/etc/prometheus/prometheus.yaml", "storage.tsdb.path=/prometheus"]
    prometheus.append("enable-feature=exemplar-storage")
    folders = {"provisioning": "/etc/grafana/provisioning", "dashboards": DASHBOARDS}
    services = {
        "collector": _service(
            "collector",
            {
                "command": ["--config=/etc/otelcol/config.yaml"],
                "volumes": [f"./{COLLECTOR}:/etc/otelcol/config.yaml:ro"],
            },
            (OTLP_GRPC, OTLP_HTTP),
            depends_on=["jaeger"],
        ),
        "jaeger": _service("jaeger", {}, (JAEGER,)),
        "prometheus": _service(
            "prometheus",
            {
                "command": [f"--{option}" for option in prometheus],
                "volumes": ["./prometheus:/etc/prometheus:ro", "prometheus:/prometheus"],
                "extra_hosts": [f"{HOST}:host-gateway"],
            },
            (PROMETHEUS,),
        ),
        "grafana": _service(
            "grafana",
            {
                "environment": grafana,
                "volumes": [f"./grafana/{folder}:{place}:ro" for folder, place in folders.items()],
            },
            (GRAFANA,),
            depends_on=["jaeger", "prometheus"],
        ),
    }
    return {"name": "vgen", "services": services, "volumes": {"prometheus": {}}}


def _service(name: str, settings: dict[str, Any], ports: Sequence[int], **dependencies: list[str]) -> dict[str, Any]:
    """A service of `compose.yaml`. Its settings stand between the image and the ports."""
    published = [f"${{BIND:-127.0.0.1}}:{port}:{port}" for port in ports]
    return {"image": IMAGES[name], **settings, "ports": published, **dependencies, "restart": "unless-stopped"}


def collector() -> dict[str, Any]:
    """The collector's configuration: OTLP in, spans to Jaeger, metrics to an endpoint for Prometheus.

    The metrics have the same names as those of OpenTelemetry's Prometheus exporter for Python.
    """
    protocols = {"grpc": {"endpoint": f"0.0.0.0:{OTLP_GRPC}"}, "http": {"endpoint": f"0.0.0.0:{OTLP_HTTP}"}}
    jaeger = {"endpoint": f"jaeger:{OTLP_GRPC}", "tls": {"insecure": True}}
    # OpenMetrics is the only format with exemplars. The scope would split series by vgen's version.
    prometheus = {"endpoint": f"0.0.0.0:{COLLECTED}", "enable_open_metrics": True, "without_scope_info": True}
    pipelines = {"traces": "otlp_grpc/jaeger", "metrics": "prometheus"}
    return {
        "receivers": {"otlp": {"protocols": protocols}},
        "processors": {"batch": {}},
        "exporters": {"otlp_grpc/jaeger": jaeger, "prometheus": prometheus},
        "service": {
            "pipelines": {
                signal: {"receivers": ["otlp"], "processors": ["batch"], "exporters": [exporter]}
                for signal, exporter in pipelines.items()
            }
        },
    }


def scrapes() -> dict[str, Any]:
    """Prometheus's configuration. It keeps the labels `job` and `instance` that the processes set."""
    collected = [{"targets": [f"collector:{COLLECTED}"]}]
    return {
        "global": {"scrape_interval": EVERY, "evaluation_interval": EVERY},
        "rule_files": [RULES],
        "scrape_configs": [
            {"job_name": "collector", "honor_labels": True, "static_configs": collected},
            {"job_name": "vllm", "file_sd_configs": [{"files": [VLLM_TARGETS]}]},
        ],
    }


def vllm_targets() -> list[dict[str, Any]]:
    """The vLLM servers that Prometheus scrapes. The user edits this file, and Prometheus reloads it by itself."""
    return [{"targets": [f"{HOST}:{VLLM}"]}]


def data_sources() -> dict[str, Any]:
    """Grafana's data sources. An exemplar's dot in a panel links to its trace in Jaeger."""
    exemplars = [{"name": EXEMPLAR, "datasourceUid": "vgen-jaeger"}]
    options = {"httpMethod": "POST", "timeInterval": EVERY, "exemplarTraceIdDestinations": exemplars}
    prometheus = {**_data_source("Prometheus", PROMETHEUS), "isDefault": True, "jsonData": options}
    return {"apiVersion": 1, "datasources": [prometheus, _data_source("Jaeger", JAEGER)]}


def _data_source(name: str, port: int) -> dict[str, Any]:
    kind = name.lower()
    return {"name": name, "uid": f"vgen-{kind}", "type": kind, "access": "proxy", "url": f"http://{kind}:{port}"}


def dashboard_providers() -> dict[str, Any]:
    """The configuration that tells Grafana where the dashboard is."""
    provider = {"name": "vgen", "type": "file", "allowUiUpdates": True, "options": {"path": DASHBOARDS}}
    return {"apiVersion": 1, "providers": [provider]}
