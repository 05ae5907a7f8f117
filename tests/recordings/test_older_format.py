"""A run that the version before recorded, in format 1, gives the same figures as it gave then.

`data/format1` is a run of two ranks on two hosts with `FakeEngine`: three steps with a generate call, a sleep, an
update, a wake-up and a sync, of which step 2 has a long sequence; then a sync that fails; then a step that never
ends. `data/format1_expected` is what the version before printed of it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.recorded_run import read_run

from vgen.cli import main
from vgen.profiling import semconv

DATA = Path(__file__).parent / "data"
RUN, EXPECTED = DATA / "format1", DATA / "format1_expected"
OLD_NAMES = re.compile('"(' + ("|".join(map(re.escape, semconv.RENAMED_ATTRIBUTES)) or "(?!)") + ')"')


def expected(name: str) -> Any:
    """What the version before made of the run, with today's names of attributes."""
    text = (EXPECTED / name).read_text()
    return json.loads(OLD_NAMES.sub(lambda match: f'"{semconv.RENAMED_ATTRIBUTES[match[1]]}"', text))


def traced(form: str, tmp_path: Path) -> str:
    file = tmp_path / f"step.{form}"
    assert main(["trace", str(RUN), "--step", "2", f"--{form}", str(file)]) == 0
    return file.read_text()


@pytest.mark.parametrize(("name", "arguments"), [("report.json", []), ("report-step2.json", ["--step", "2"])])
def test_the_report_gives_the_same_figures(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(RUN), "--json", *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    before = {**expected(name), "run": str(RUN)}
    # as text, so that the order of the keys and the types of the numbers are compared too
    assert json.dumps(printed, indent=1) == json.dumps(before, indent=1)


@pytest.mark.parametrize("form", ["chrome", "jaeger", "otlp"])
def test_exports_are_the_same(form: str, tmp_path: Path):
    assert json.loads(traced(form, tmp_path)) == expected(f"{form}.json")


def test_the_page_has_the_same_spans(tmp_path: Path):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', traced("html", tmp_path), re.S)
    assert json.loads(data) == expected("page.json")


def test_the_picture_has_the_same_text(tmp_path: Path):
    assert re.findall(r"<text[^>]*>(.*?)</text>", traced("svg", tmp_path)) == (
        (EXPECTED / "svg.txt").read_text().splitlines()
    )


def test_no_old_name_is_left():
    run = read_run(RUN)
    assert len(run.spans) == 99
    attributes = {key for span in run.spans for key in span.attributes}
    attributes |= {key for measurement in run.measurements for key in measurement["attributes"]}
    attributes |= {key for span in run.spans for event in span.events for key in event["attributes"]}
    assert not attributes & semconv.RENAMED_ATTRIBUTES.keys()
    assert attributes <= semconv.ATTRIBUTES.keys()
    metrics = {measurement["name"] for measurement in run.measurements}
    assert not metrics & semconv.RENAMED_METRICS.keys()
    assert metrics <= semconv.METRICS.keys()
    summed = {key.removesuffix(f".{part}") for _, row in run.rows for key in row for part in ("count", "sum", "max")}
    assert not summed & semconv.RENAMED_METRICS.keys()
