"""What `make mutants` changes and what it leaves alone."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import mutants  # noqa: E402


def changes(source: str) -> set[tuple[str, str, str]]:
    """Each change of the source: its function, and the text before and after."""
    nodes = mutants.Mutations(source.encode()).found
    return {(function, ast.get_source_segment(source, node) or "", after) for function, _, node, after in nodes}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(a, b):\n    return a < b", {("a < b", "(a <= b)"), ("a < b", "(a >= b)")}),
        ("def f(a):\n    return not a", {("not a", "(a)")}),
        ("def f(a, b):\n    return a and b", {("a and b", "(a or b)")}),
        ("def f(a, b):\n    return g(a, b)", {("g(a, b)", "(g(b, a))"), ("return g(a, b)", "return None")}),
        ("def f(a):\n    if a:\n        raise E(1)", {("a", "(not (a))"), ("raise E(1)", "pass")}),
        ("def f(a):\n    for b in a:\n        continue", {("continue", "break")}),
        ("def f(a):\n    a.b = 3", {("a.b = 3", "pass"), ("3", "4")}),
        ("def f(a):\n    a.b()", {("a.b()", "pass")}),
        ("def f(a):\n    return max(a) - 1", {("max", "min"), ("max(a) - 1", "(max(a) + 1)"), ("1", "2")}),
    ],
)
def test_what_is_changed(source, expected):
    assert {(before, after) for _, before, after in changes(source)} >= expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A text of 3 < 4."""',
        "def f() -> int:\n    return None",
        "def f(a: Literal[3]):\n    '''3 < 4'''",
        "def f(a):\n    logger.warning('%d', 3)",
        "def f():\n    x: Literal[3]",
        "class C:\n    def __repr__(self):\n        return f(3)",
        "if TYPE_CHECKING:\n    x = 3",
        "def f():\n    return f'{3 < 4}' if 0.5 else None",
    ],
)
def test_texts_messages_and_types_are_left_alone(source):
    # What is returned may be left out: no text is changed by that.
    assert {change for change in changes(source) if not change[2].startswith("return")} == set()


def test_only_the_condition_of_a_raise_is_changed_and_not_its_message():
    assert changes("def f(a):\n    raise E(3 < a, 'text')") == {("f", "raise E(3 < a, 'text')", "pass")}


def test_a_function_has_the_name_that_python_gives_it():
    source = "class C:\n    def f(self):\n        def g():\n            a.b()\n        x.y()\nz = 3"
    assert {(function, before) for function, before, _ in changes(source)} >= {
        ("C.f.<locals>.g", "a.b()"),
        ("C.f", "x.y()"),
        ("", "3"),
    }


def test_the_draw_is_fixed_and_every_change_can_be_parsed():
    drawn = mutants.draw()
    assert [mutant.id for mutant in drawn] == [mutant.id for mutant in mutants.draw()]
    assert {room: sum(mutant.room == room for mutant in drawn) for room in mutants.ROOMS} == dict.fromkeys(
        mutants.ROOMS, mutants.PER_ROOM
    )
    for mutant in drawn:
        source = (ROOT / "src" / "vgen" / mutant.module).read_bytes()
        assert source[mutant.start : mutant.end].decode() == mutant.before
        ast.parse(source[: mutant.start] + mutant.after.encode() + source[mutant.end :])


def test_a_change_elsewhere_leaves_the_draw_as_it_is(tmp_path, monkeypatch):
    room = tmp_path / "src" / "vgen" / "weights"
    room.mkdir(parents=True)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (room / "a.py").write_text("def f(a):\n    return a < 3\n")
    before = mutants.mutants_of("weights")
    (room / "a.py").write_text("import os\n\n\ndef g(b):\n    return b + 1\n\n\ndef f(a):\n    return a < 3\n")
    after = mutants.mutants_of("weights")
    assert {mutant.id for mutant in before} < {mutant.id for mutant in after}
    assert len(before) == 4


def test_each_mutant_that_no_test_can_notice_has_its_reason():
    listed = json.loads(mutants.EQUIVALENT.read_text())
    assert all(len(entry["why"].split()) >= 3 for entry in listed.values())
