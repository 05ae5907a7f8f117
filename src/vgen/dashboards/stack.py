"""A collector, Jaeger, Prometheus and Grafana, wired to each other: `docker compose up` in the folder.

Metrics and spans go to the collector over OTLP; it hands spans on to Jaeger, and Prometheus scrapes the rest
from it, exemplars with trace ids included. Grafana comes with both as data sources and with the dashboard.
"""

from __future__ import annotations

from typing import Any

from .grafana import UID

IMAGES = {
    "collector": "otel/opentelemetry-collector-contrib:0.157.0",
    "jaeger": "jaegertracing/jaeger:2.19.0",
    "prometheus": "prom/prometheus:v3.13.1",
    "grafana": "grafana/grafana:13.1.0",
}
"""Versions that the OpenTelemetry project runs together in its own demo."""

OTLP_GRPC, OTLP_HTTP, COLLECTED, JAEGER, PROMETHEUS, GRAFANA, VLLM = 4317, 4318, 8889, 16686, 9090, 3000, 8000
HOST = "host.docker.internal"
"""The machine itself, as a container sees it."""
EVERY = "15s"
EXEMPLAR = "trace_id"
"""The label in which the collector hands on an exemplar's trace."""

COMPOSE, COLLECTOR, SCRAPES, RULES = "compose.yaml", "otel-collector.yaml", "prometheus/prometheus.yaml", "rules.yaml"
VLLM_TARGETS, SOURCES, PROVIDERS = "vllm-targets.yaml", "datasources/vgen.yaml", "dashboards/vgen.yaml"


def compose() -> dict[str, Any]:
    """`compose.yaml`. Ports are open to this machine alone unless `BIND` says otherwise: nobody asks for a password."""

    def ports(*numbers: int) -> list[str]:
        return [f"${{BIND:-127.0.0.1}}:{number}:{number}" for number in numbers]

    return {
        "name": "vgen",
        "services": {
            "collector": {
                "image": IMAGES["collector"],
                "command": ["--config=/etc/otelcol/config.yaml"],
                "volumes": [f"./{COLLECTOR}:/etc/otelcol/config.yaml:ro"],
                "ports": ports(OTLP_GRPC, OTLP_HTTP),
                "depends_on": ["jaeger"],
                "restart": "unless-stopped",
            },
            "jaeger": {"image": IMAGES["jaeger"], "ports": ports(JAEGER), "restart": "unless-stopped"},
            "prometheus": {
                "image": IMAGES["prometheus"],
                "command": [
                    "--config.file=/etc/prometheus/prometheus.yaml",
                    "--storage.tsdb.path=/prometheus",
                    "--enable-feature=exemplar-storage",
                ],
                "volumes": ["./prometheus:/etc/prometheus:ro", "prometheus:/prometheus"],
                "extra_hosts": [f"{HOST}:host-gateway"],
                "ports": ports(PROMETHEUS),
                "restart": "unless-stopped",
            },
            "grafana": {
                "image": IMAGES["grafana"],
                "environment": {
                    "GF_AUTH_ANONYMOUS_ENABLED": "true",
                    "GF_AUTH_ANONYMOUS_ORG_ROLE": "Admin",
                    "GF_AUTH_DISABLE_LOGIN_FORM": "true",
                    "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": f"/var/lib/grafana/dashboards/{UID}.json",
                },
                "volumes": [
                    "./grafana/provisioning:/etc/grafana/provisioning:ro",
                    "./grafana/dashboards:/var/lib/grafana/dashboards:ro",
                ],
                "ports": ports(GRAFANA),
                "depends_on": ["jaeger", "prometheus"],
                "restart": "unless-stopped",
            },
        },
        "volumes": {"prometheus": {}},
    }


def collector() -> dict[str, Any]:
    """OTLP in; spans to Jaeger, metrics to where Prometheus scrapes them, in the names that vgen's exporter has too."""
    return {
        "receivers": {
            "otlp": {
                "protocols": {
                    "grpc": {"endpoint": f"0.0.0.0:{OTLP_GRPC}"},
                    "http": {"endpoint": f"0.0.0.0:{OTLP_HTTP}"},
                }
            }
        },
        "processors": {"batch": {}},
        "exporters": {
            "otlp_grpc/jaeger": {"endpoint": f"jaeger:{OTLP_GRPC}", "tls": {"insecure": True}},
            # In OpenMetrics, the one format with exemplars; without the scope, which would split series by version.
            "prometheus": {
                "endpoint": f"0.0.0.0:{COLLECTED}",
                "enable_open_metrics": True,
                "without_scope_info": True,
            },
        },
        "service": {
            "pipelines": {
                "traces": {"receivers": ["otlp"], "processors": ["batch"], "exporters": ["otlp_grpc/jaeger"]},
                "metrics": {"receivers": ["otlp"], "processors": ["batch"], "exporters": ["prometheus"]},
            }
        },
    }


def scrapes() -> dict[str, Any]:
    """Prometheus's configuration. `job` and `instance` stay what the processes say of themselves."""
    return {
        "global": {"scrape_interval": EVERY, "evaluation_interval": EVERY},
        "rule_files": [RULES],
        "scrape_configs": [
            {
                "job_name": "collector",
                "honor_labels": True,
                "static_configs": [{"targets": [f"collector:{COLLECTED}"]}],
            },
            {"job_name": "vllm", "file_sd_configs": [{"files": [VLLM_TARGETS]}]},
        ],
    }


def vllm_targets() -> list[dict[str, Any]]:
    """The servers whose own metrics are scraped: for the user to change, and read again by itself."""
    return [{"targets": [f"{HOST}:{VLLM}"]}]


def data_sources() -> dict[str, Any]:
    """Grafana's: a dot in a panel leads to its trace."""
    prometheus = {
        "name": "Prometheus",
        "uid": "vgen-prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": f"http://prometheus:{PROMETHEUS}",
        "isDefault": True,
        "jsonData": {
            "httpMethod": "POST",
            "timeInterval": EVERY,
            "exemplarTraceIdDestinations": [{"name": EXEMPLAR, "datasourceUid": "vgen-jaeger"}],
        },
    }
    jaeger = {
        "name": "Jaeger",
        "uid": "vgen-jaeger",
        "type": "jaeger",
        "access": "proxy",
        "url": f"http://jaeger:{JAEGER}",
    }
    return {"apiVersion": 1, "datasources": [prometheus, jaeger]}


def dashboard_providers() -> dict[str, Any]:
    """Where Grafana finds the dashboard."""
    provider = {
        "name": "vgen",
        "type": "file",
        "allowUiUpdates": True,
        "options": {"path": "/var/lib/grafana/dashboards"},
    }
    return {"apiVersion": 1, "providers": [provider]}
