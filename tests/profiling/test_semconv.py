"""Nothing is emitted that `semconv.py` does not list, and the listed names follow the rules of OpenTelemetry."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.telemetry_names import CONVENTIONS, KNOWN

import vgen
from vgen.profiling import semconv

ROOT = Path(__file__).parents[2]
SOURCE = Path(vgen.__file__).parent
RENAMED = {**semconv.RENAMED_ATTRIBUTES, **semconv.RENAMED_METRICS}
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


def is_constant_of_semconv(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Attribute) and isinstance(key.value, ast.Name) and key.value.id == "semconv"


def called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@pytest.mark.parametrize("path", library(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_name_is_spelled_out_that_semconv_py_does_not_list(path: Path):
    tree = ast.parse(path.read_text())
    shape = re.compile(rf"({'|'.join(map(re.escape, semconv.RESERVED))})[a-z][a-z0-9_.]*")
    for node in literals(tree):
        if shape.fullmatch(node.value) and not (SOURCE / (node.value[5:].replace(".", "/") + ".py")).exists():
            known = KNOWN | RENAMED.keys() if path.name == "semconv.py" else KNOWN
            assert node.value in known, f"{path}:{node.lineno} spells out {node.value!r}: list it in semconv.py"


@pytest.mark.parametrize("path", library(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_span_event_and_attribute_that_the_library_writes_is_a_constant_of_semconv_py(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        dicts = [node] if isinstance(node, ast.Dict) and any(is_constant_of_semconv(key) for key in node.keys) else []
        if (
            isinstance(node, ast.Call)
            and called(node) in OPENING
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            written = node.args[0].value
            assert written in KNOWN, f"{path}:{node.lineno} opens {written!r}: give it a constant in semconv.py"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ADDING:
            dicts += [argument for argument in node.args if isinstance(argument, ast.Dict)]
        for key in [key.value for found in dicts for key in found.keys if isinstance(key, ast.Constant)]:
            assert key in KNOWN, f"{path}:{node.lineno} writes the attribute {key!r}: list it in semconv.py"


def test_the_static_check_sees_a_stray_name():
    tree = ast.parse('"""vgen.stray"""\nlogger = getLogger("vgen.telemetry")\nspan("vgen.stray")')
    assert [node.value for node in literals(tree)] == ["vgen.stray"]


def test_names_follow_opentelemetrys_rules():
    """Dotted, lowercase, no unit in the name; https://opentelemetry.io/docs/specs/semconv/general/naming/."""
    for name in KNOWN:
        assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)*(\.[a-z0-9]+(_[a-z0-9]+)*)*", name), name
    for metric in semconv.METRICS.values():
        assert not re.search(r"(second|byte|total)s?$", metric.name), metric.name
        assert metric.unit in ("s", "By", "By/s", "1") or re.fullmatch(r"\{[a-z]+\}(/s)?", metric.unit), metric
        assert metric.description.endswith("."), metric.name


def test_what_is_listed_belongs_together():
    for span in semconv.SPANS.values():
        assert set(span.attributes) <= set(semconv.ATTRIBUTES), span.name
    for metric in semconv.METRICS.values():
        for label in metric.attributes:
            assert semconv.ATTRIBUTES[label].label, f"{metric.name}: {label} is not said to take few values"
    for alias in (*semconv.GEN_AI.metrics, *semconv.GEN_AI_INFERENCE.metrics):
        assert alias.of in semconv.METRICS
        assert alias.instrument.kind == semconv.METRICS[alias.of].kind
        assert set(alias.constant) <= set(alias.instrument.attributes)
        assert set(alias.instrument.attributes) <= set(semconv.ATTRIBUTES)
    assert not any(
        semconv.ATTRIBUTES[name].label for name in (semconv.STEP_NUMBER, semconv.REQUEST_ID, semconv.WEIGHT_VERSION)
    )


def test_no_metric_has_the_name_of_a_spans_duration():
    durations = {semconv.duration(span).name for span in semconv.SPANS}
    assert not durations & set(semconv.METRICS)


def emitted_metrics(*conventions: semconv.Convention) -> set[str]:
    """The names of all metrics: vgen's, the durations of its spans, and those of other vocabularies."""
    names = {*semconv.METRICS, *(f"{span}.duration" for span in semconv.SPANS.keys() - semconv.SELECTED)}
    for convention in conventions:
        names |= {alias.instrument.name for alias in convention.metrics}
        names |= {f"{span}.duration" for span in convention.spans.values()}
    return names


def coinciding(names: set[str]) -> set[tuple[str, str]]:
    """Pairs of a name and another one that is in the namespace of that name."""
    return {(name, other) for name in names for other in names if other.startswith(f"{name}.")}


@pytest.mark.parametrize(
    "names",
    [semconv.ATTRIBUTES.keys() | semconv.RESOURCE.keys(), set(semconv.EVENTS), emitted_metrics(*CONVENTIONS)],
    ids=["attributes", "events", "metrics"],
)
def test_no_name_is_also_a_namespace(names: set[str]):
    """OpenTelemetry's rule: https://opentelemetry.io/docs/specs/semconv/general/naming/."""
    assert coinciding(names) == set()


def test_the_check_of_namespaces_finds_what_was_renamed():
    old = semconv.ATTRIBUTES.keys() - set(semconv.RENAMED_ATTRIBUTES.values()) | semconv.RENAMED_ATTRIBUTES.keys()
    assert {name for pair in coinciding(old) for name in pair} >= semconv.RENAMED_ATTRIBUTES.keys()
    metrics = emitted_metrics() - set(semconv.RENAMED_METRICS.values()) | semconv.RENAMED_METRICS.keys()
    assert coinciding(metrics) == {("vgen.engine.state", "vgen.engine.state.age")}


def test_old_names_are_gone_and_new_names_are_listed():
    assert not RENAMED.keys() & {*semconv.ATTRIBUTES, *semconv.METRICS}
    assert set(semconv.RENAMED_ATTRIBUTES.values()) <= semconv.ATTRIBUTES.keys()
    assert set(semconv.RENAMED_METRICS.values()) <= semconv.METRICS.keys()


def test_the_changelog_has_every_renamed_name():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for old, new in RENAMED.items():
        assert f"| `{old}` | `{new}` |" in changelog
