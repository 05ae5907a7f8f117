"""Nothing is emitted that `names.py` does not list, and the page of all names is up to date."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vgen
from vgen.profiling import Instrument, ProfilingContext, names, reference
from vgen.testing import MemorySink

ROOT = Path(__file__).parents[2]
SOURCE = Path(vgen.__file__).parent
KNOWN = {*names.SPANS, *names.METRICS, *names.ATTRIBUTES, *names.EVENTS, *names.RESOURCE}
KNOWN |= {alias.instrument.name for alias in names.GEN_AI.metrics}
KNOWN |= {name for name in names.RL_EXPERIMENTAL.spans.values()}
NAMING = {"getLogger", "ContextVar", "create_key"}
"""Calls whose strings are names of other things."""
OPENING = {"span", "rebuilt", "event"}
ADDING = {"set", "bind", "span", "step", "record", "record_many", "event", "link"}
PLAYS_THE_USER = {"demo.py", "testing.py"}


def library() -> Iterator[Path]:
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name not in PLAYS_THE_USER:
            yield path


def literals(tree: ast.AST) -> Iterator[ast.Constant]:
    """String constants that are neither docstrings nor the names of loggers and context variables."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.Call) and called(node) in NAMING:
            skipped.update(id(argument) for argument in node.args)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node


def is_constant_of_names(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Attribute) and isinstance(key.value, ast.Name) and key.value.id == "names"


def called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@pytest.mark.parametrize("path", library(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_name_is_spelled_out_that_names_py_does_not_list(path: Path):
    tree = ast.parse(path.read_text())
    shape = re.compile(rf"({'|'.join(map(re.escape, names.RESERVED))})[a-z][a-z0-9_.]*")
    for node in literals(tree):
        if shape.fullmatch(node.value) and not (SOURCE / (node.value[5:].replace(".", "/") + ".py")).exists():
            assert node.value in KNOWN, f"{path}:{node.lineno} spells out {node.value!r}: list it in names.py"


@pytest.mark.parametrize("path", library(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_span_event_and_attribute_that_the_library_writes_is_a_constant_of_names_py(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        dicts = [node] if isinstance(node, ast.Dict) and any(is_constant_of_names(key) for key in node.keys) else []
        if (
            isinstance(node, ast.Call)
            and called(node) in OPENING
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            written = node.args[0].value
            assert written in KNOWN, f"{path}:{node.lineno} opens {written!r}: give it a constant in names.py"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ADDING:
            dicts += [argument for argument in node.args if isinstance(argument, ast.Dict)]
        for key in [key.value for found in dicts for key in found.keys if isinstance(key, ast.Constant)]:
            assert key in KNOWN, f"{path}:{node.lineno} writes the attribute {key!r}: list it in names.py"


def test_the_static_check_sees_a_stray_name():
    tree = ast.parse('"""vgen.stray"""\nlogger = getLogger("vgen.telemetry")\nspan("vgen.stray")')
    assert [node.value for node in literals(tree)] == ["vgen.stray"]


def test_the_reference_page_is_what_names_py_says():
    page = (ROOT / "docs" / "telemetry.md").read_text()
    assert page == reference.page(), "run: python -m vgen.profiling.reference > docs/telemetry.md"


def test_the_reference_page_has_every_name():
    page = reference.page()
    for name in KNOWN:
        assert f"`{name}`" in page


def test_a_run_with_names_of_vgens_that_are_not_listed_is_found_out():
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    stray = Instrument("vgen.stray.metric", "counter")
    with profiling.span("reward", mine=1), profiling.span("vgen.stray", {"gen_ai.stray": 1}) as span:
        span.event("vgen.stray.event")
        profiling.record(stray, 1)
    found = " ".join(reference.unknown(sink.spans, sink.measurements))
    for name in ("span vgen.stray ", "event vgen.stray.event", "metric vgen.stray.metric", "attribute gen_ai.stray"):
        assert name in found
    assert "reward" not in found
    assert "mine" not in found


def test_a_run_that_was_read_back_is_checked_alike(tmp_path: Path):
    from vgen.analysis.run import read_run
    from vgen.profiling.sinks.jsonl import JsonlSink

    with ProfilingContext([JsonlSink(tmp_path)]) as profiling, profiling.step(1):
        profiling.record(names.GENERATED_TOKENS, 1)
        with profiling.span("vgen.stray") as span:
            span.event("vgen.stray.event")
    run = read_run(tmp_path)
    assert reference.unknown(run.spans, run.measurements) == [
        "span vgen.stray is not in names.py",
        "event vgen.stray.event is not in names.py",
    ]


def test_names_follow_opentelemetrys_rules():
    """Dotted, lowercase, no unit in the name; https://opentelemetry.io/docs/specs/semconv/general/naming/."""
    for name in KNOWN:
        assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)*(\.[a-z0-9]+(_[a-z0-9]+)*)*", name), name
    for metric in names.METRICS.values():
        assert not re.search(r"(second|byte|total)s?$", metric.name), metric.name
        assert metric.unit in ("s", "By", "By/s", "1") or re.fullmatch(r"\{[a-z]+\}(/s)?", metric.unit), metric
        assert metric.description.endswith("."), metric.name


def test_what_is_listed_belongs_together():
    for span in names.SPANS.values():
        assert set(span.attributes) <= set(names.ATTRIBUTES), span.name
    for metric in names.METRICS.values():
        for label in metric.attributes:
            assert names.ATTRIBUTES[label].label, f"{metric.name}: {label} is not said to take few values"
    for alias in names.GEN_AI.metrics:
        assert alias.of in names.METRICS
        assert set(alias.constant) <= set(alias.instrument.attributes)
        assert set(alias.instrument.attributes) <= set(names.ATTRIBUTES)
    assert not any(names.ATTRIBUTES[name].label for name in (names.STEP_NUMBER, names.REQUEST_ID, names.WEIGHT_VERSION))


def test_no_metric_has_the_name_of_a_spans_duration():
    durations = {names.duration(span).name for span in names.SPANS}
    assert not durations & set(names.METRICS)
