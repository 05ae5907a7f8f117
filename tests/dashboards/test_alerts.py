"""The alert rules under `promtool test rules`: each fires when it should, and is silent when it should be."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.scraper import needs_promtool

from vgen.dashboards import alerts
from vgen.dashboards.promql import label, series
from vgen.profiling import semconv
from vgen.profiling.measurement import Instrument

pytestmark = needs_promtool

RUN = ('job="grpo"', 'instance="a"')
SYNC = semconv.duration(semconv.WEIGHT_SYNC)
CALL = semconv.duration(semconv.ENGINE_GENERATE)
FAILED = f'{label(semconv.ERROR_TYPE)}="WeightSyncError"'
COLOCATE = f'{label(semconv.ENGINE)}="colocate"'


def histogram(instrument: Instrument, upper: dict[str, str], mean: float = 0) -> dict[str, str]:
    """Cumulated buckets by their upper bound, in promtool's notation; the count is the last one's."""
    found = {series(instrument, (*RUN, COLOCATE, f'le="{le}"'), "bucket"): values for le, values in upper.items()}
    counts = upper["+Inf"]
    found[series(instrument, (*RUN, COLOCATE), "count")] = counts
    start, _, more = counts.partition("+")
    step, _, times = more.partition("x")
    found[series(instrument, (*RUN, COLOCATE), "sum")] = f"{int(start) * mean}+{int(step) * mean}x{times}"
    return found


@dataclass
class Case:
    """What is scraped each minute, and when the alert is to be firing."""

    alert: str
    inputs: dict[str, str]
    firing: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()


def syncs(values: str, *error: str) -> dict[str, str]:
    return {series(SYNC, (*RUN, COLOCATE, *error), "count"): values}


SPREAD = histogram(semconv.REQUEST_E2E, {"1": "0+95x40", "10": "0+95x40", "60": "0+100x40", "+Inf": "0+100x40"})
EVEN = histogram(semconv.REQUEST_E2E, {"1": "0+95x40", "2.5": "0+100x40", "+Inf": "0+100x40"})
FEW = histogram(semconv.REQUEST_E2E, {"1": "0+8x40", "10": "0+8x40", "60": "0+9x40", "+Inf": "0+9x40"})
DROPPED = series(semconv.DROPPED, (*RUN, f'{label(semconv.SINK)}="OTelSink"'))


def waiting(request: float, call: float) -> dict[str, str]:
    both = {"+Inf": "0+8x40"}
    return histogram(semconv.REQUEST_E2E, both, request) | histogram(CALL, {"+Inf": "0+1x40"}, call)


def drift(nats: str) -> dict[str, str]:
    """1,000 tokens a minute, and the sum of their differences."""
    count, total = (series(semconv.DRIFT, (*RUN, COLOCATE), part=part) for part in ("count", "sum"))
    return {count: "0+1000x40", total: nats}


def gauge(instrument: Instrument, values: str) -> dict[str, str]:
    return {series(instrument, (*RUN, COLOCATE, f'{label(semconv.ENGINE_NUMBER)}="0"')): values}


def leaked(values: str) -> dict[str, str]:
    return {series(semconv.LEAKED_TOTAL, (*RUN, COLOCATE, f'{label(semconv.SLEEP_LEVEL)}="2"')): values}


AWAKE, FAILED_STATE = semconv.STATES.index("awake"), semconv.STATES.index("failed")

CASES = {
    "a stall, while it lasts": Case(
        "VgenEngineStalled", gauge(semconv.STALLED, "0x4 70+60x5 0x20"), ("7m", "10m"), ("4m", "5m", "13m")
    ),
    "an engine that stays failed": Case(
        "VgenEngineFailed", gauge(semconv.ENGINE_STATE, f"{AWAKE}x4 {FAILED_STATE}x20"), ("11m",), ("4m", "8m")
    ),
    "an engine that a sync repairs at once": Case(
        "VgenEngineFailed", gauge(semconv.ENGINE_STATE, f"{FAILED_STATE}x2 {AWAKE}x20"), silent=("2m", "11m")
    ),
    "a leak stays": Case("VgenSleepLeaks", leaked(f"0x4 {2**29}x20"), ("6m", "20m"), ("3m",)),
    "a little is not worth a call": Case("VgenSleepLeaks", leaked(f"{2**20}x20"), silent=("10m",)),
    "the first failed sync is seen, though its counter was not there before": Case(
        "VgenWeightSyncFailed", syncs("1+1x40") | syncs("_x10 1x30", FAILED), ("11m", "19m"), ("9m", "31m")
    ),
    "another failed sync is seen": Case(
        "VgenWeightSyncFailed", syncs("3x19 4x20", FAILED), ("21m", "28m"), ("15m", "35m")
    ),
    "syncs that succeed are nobody's business": Case("VgenWeightSyncFailed", syncs("1+1x40"), silent=("5m", "30m")),
    "a long tail, once it has lasted": Case("VgenLongTail", SPREAD, ("25m",), ("5m",)),
    "requests that end together have no tail": Case("VgenLongTail", EVEN, silent=("25m",)),
    "a few requests have no p99": Case("VgenLongTail", FEW, silent=("25m",)),
    "calls that mostly wait": Case("VgenWaitingForTail", waiting(request=2, call=10), ("25m",), ("5m",)),
    "calls that do not": Case("VgenWaitingForTail", waiting(request=8, call=10), silent=("25m",)),
    "engine and trainer apart": Case("VgenLogprobsDrift", drift("0+200x40"), ("25m",), ("0m",)),
    "engine and trainer alike": Case("VgenLogprobsDrift", drift("0+5x40"), silent=("25m",)),
    "records lost at once": Case("VgenTelemetryDropped", {DROPPED: "_x10 250x30"}, ("12m",), ("9m", "35m")),
    "records lost again": Case("VgenTelemetryDropped", {DROPPED: "5x20 9x20"}, ("22m",), ("15m", "35m")),
}


def promtool(folder: Path, test: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (folder / "rules.yaml").write_text(yaml.safe_dump(alerts.rules()))
    whole = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (folder / "test.yaml").write_text(yaml.safe_dump(whole))
    command = ["promtool", "test", "rules", str(folder / "test.yaml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def scraped(inputs: dict[str, str]) -> dict[str, Any]:
    found = [{"series": name.replace(", ", ","), "values": values} for name, values in inputs.items()]
    return {"interval": "1m", "input_series": found}


@pytest.mark.parametrize("name", CASES)
def test_each_alert_fires_when_it_should_and_only_then(name: str, tmp_path: Path):
    case = CASES[name]
    asked = f'count by (alertname, job) (ALERTS{{alertname="{case.alert}", alertstate="firing"}})'
    fires = [{"labels": f'{{alertname="{case.alert}", job="grpo"}}', "value": 1}]
    tests = [
        {"expr": asked, "eval_time": time, "exp_samples": fires if time in case.firing else []}
        for time in (*case.firing, *case.silent)
    ]
    checked = promtool(tmp_path, {**scraped(case.inputs), "promql_expr_test": tests})
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    everything = {alert.name for alert in alerts.alerts()}
    assert {case.alert for case in CASES.values() if case.firing} == everything
    assert {case.alert for case in CASES.values() if case.silent} == everything


def test_what_an_alert_says_names_the_run_the_process_and_the_error(tmp_path: Path):
    said = {
        "summary": "grpo a: a weight sync failed",
        "description": "`vgen.weight_sync` ended with WeightSyncError. The engine's weights are unknown. It "
        "generates nothing until a full sync succeeds.",
    }
    labels = {"severity": "critical", "job": "grpo", "instance": "a"}
    labels |= {label(semconv.ENGINE): "colocate", label(semconv.ERROR_TYPE): "WeightSyncError"}
    expected = {"exp_labels": labels, "exp_annotations": said}
    test = {"eval_time": "5m", "alertname": "VgenWeightSyncFailed", "exp_alerts": [expected]}
    checked = promtool(tmp_path, {**scraped(syncs("1x40", FAILED)), "alert_rule_test": [test]})
    assert checked.returncode == 0, checked.stdout + checked.stderr
