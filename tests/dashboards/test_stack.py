"""The compose file and what it mounts fit together: ports, hosts, paths, data sources."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.scraper import needs_promtool

from vgen.dashboards import stack
from vgen.dashboards.files import files, write
from vgen.profiling import semconv
from vgen.profiling.measurement import Instrument


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stack")
    assert write(made) == 0
    return made


@pytest.fixture(scope="module")
def services(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "compose.yaml").read_text())["services"]


def load(folder: Path, name: str) -> Any:
    return yaml.safe_load((folder / name).read_text())


@needs_promtool
def test_prometheus_accepts_its_configuration_with_the_rules(folder: Path):
    config = folder / "prometheus/prometheus.yaml"
    checked = subprocess.run(["promtool", "check", "config", config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "rules.yaml is valid" in checked.stdout or "1 rule files found" in checked.stdout


def test_the_compose_file_is_of_the_compose_specification(folder: Path):
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", folder / "compose.yaml"]
    checked = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker here")
def test_docker_compose_accepts_the_compose_file(folder: Path):
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("this docker has no compose plugin")
    command = ["docker", "compose", "-f", folder / "compose.yaml", "config", "-q"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_images_have_a_version_of_their_own(services: dict[str, Any]):
    assert {service["image"] for service in services.values()} == set(stack.IMAGES.values())
    for image in stack.IMAGES.values():
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", image)


def test_what_is_mounted_is_there_and_nothing_is_left_over(folder: Path, services: dict[str, Any]):
    sources = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    mounted = [folder / source for source in sources if source.startswith("./")]
    assert all(path.exists() for path in mounted)
    for name in set(files()) - {"compose.yaml"}:
        assert any((folder / name).is_relative_to(path) for path in mounted), name


def test_paths_inside_the_containers_are_where_things_are_mounted(folder: Path, services: dict[str, Any]):
    def inside(service: str, path: str) -> Path:
        for volume in services[service]["volumes"]:
            source, target = volume.split(":")[:2]
            if Path(path).is_relative_to(target):
                return folder / source / Path(path).relative_to(target)
        raise AssertionError(f"{path} is not mounted in {service}")

    (collector,) = services["collector"]["command"]
    assert inside("collector", collector.partition("=")[2]) == folder / "otel-collector.yaml"
    config = services["prometheus"]["command"][0].partition("=")[2]
    assert inside("prometheus", config) == folder / "prometheus/prometheus.yaml"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert inside("grafana", home).is_file()
    (provider,) = load(folder, "grafana/provisioning/dashboards/vgen.yaml")["providers"]
    assert inside("grafana", provider["options"]["path"]) == folder / "grafana/dashboards"


def test_every_address_is_a_service_of_the_file_and_one_of_its_ports(folder: Path, services: dict[str, Any]):
    """Where one service says where another is, the other listens there."""
    listens = {
        "jaeger": {4317, 4318, 16686},  # of the image, as it comes
        "prometheus": {9090},
        "grafana": {3000},
        "collector": {
            int(port) for port in re.findall(r"0\.0\.0\.0:(\d+)", (folder / "otel-collector.yaml").read_text())
        },
    }
    everything = "\n".join(text for name, text in files().items() if name.endswith(".yaml"))
    named = set(re.findall(r"\b(jaeger|prometheus|grafana|collector):(\d{4,5})\b", everything))
    assert len(named) >= 4
    for host, port in named:
        assert host in services
        assert int(port) in listens[host], (host, port)
    for name, service in services.items():
        for published in service["ports"]:
            bind, outer, inner = published.rsplit(":", 2)
            assert bind == "${BIND:-127.0.0.1}"  # nothing asks for a password
            assert outer == inner
            assert int(inner) in listens[name]


def test_the_collector_hands_on_both_signals(folder: Path):
    config = load(folder, "otel-collector.yaml")
    pipelines = config["service"]["pipelines"]
    assert set(pipelines) == {"traces", "metrics"}
    for pipeline in pipelines.values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(config[kind])
    used = {exporter for pipeline in pipelines.values() for exporter in pipeline["exporters"]}
    assert used == set(config["exporters"])


@pytest.mark.parametrize("metric", semconv.METRICS.values(), ids=lambda metric: metric.name)
def test_the_collector_spells_each_name_as_vgens_own_exporter_does(metric: Instrument):
    """It adds `_ratio` to a gauge whose unit is `1`, and the exporter of OpenTelemetry's SDK does not."""
    assert (metric.kind, metric.unit) != ("gauge", "1")


def test_an_exemplar_leads_from_prometheus_to_jaeger(folder: Path, services: dict[str, Any]):
    """Each link of the chain has it switched on: the collector, Prometheus, and Grafana's data source."""
    assert load(folder, "otel-collector.yaml")["exporters"]["prometheus"]["enable_open_metrics"] is True
    assert "--enable-feature=exemplar-storage" in services["prometheus"]["command"]
    sources = load(folder, "grafana/provisioning/datasources/vgen.yaml")["datasources"]
    (prometheus,) = [source for source in sources if source["type"] == "prometheus"]
    (jaeger,) = [source for source in sources if source["type"] == "jaeger"]
    assert prometheus["jsonData"]["exemplarTraceIdDestinations"] == [
        {"name": "trace_id", "datasourceUid": jaeger["uid"]}
    ]
