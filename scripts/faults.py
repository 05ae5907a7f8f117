"""Writes docs/faults.md, the faults that tests plant, from their markers: `python scripts/faults.py`.

A test that plants a fault has the marker `fault`, with texts for the table:

    @pytest.mark.fault(point="the disk under a record", did="The disk is full", happens="Records are lost", within=20)

`within` is also the test's timeout, see tests/conftest.py.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# Faults

What vgen does when something else fails. Each row is a test that plants the fault; {rows} faults at {points} points. No
test may take longer than the seconds of its row, so that nothing hangs; most end in a small part of that. A test that
counts completions, records or updates checks that each came once: nothing is lost without a word, and nothing doubled.
`scripts/faults.py` makes this page from the tests' markers.
"""


class Fault(NamedTuple):
    """One row."""

    point: str
    did: str
    happens: str
    within: float
    test: str


def faults() -> list[Fault]:
    """All faults that tests plant, in the order of the files."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for test in ast.parse(path.read_text(encoding="utf-8")).body:
            for decorator in getattr(test, "decorator_list", []):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                    values = {each.arg or "": ast.literal_eval(each.value) for each in decorator.keywords}
                    name = getattr(test, "name", "")
                    found.append(Fault(**values, test=f"{path.relative_to(ROOT / 'tests')}::{name}"))
    return found


def page() -> str:
    """The text of docs/faults.md."""
    by_point = defaultdict[str, list[Fault]](list)
    for fault in faults():
        by_point[fault.point].append(fault)
    parts = [HEAD.format(rows=sum(map(len, by_point.values())), points=len(by_point))]
    for point in sorted(by_point, key=str.lower):
        rows = [
            f"| {each.did} | {each.happens} | {each.within:g} s | `{each.test}` |".replace("::", "` `")
            for each in by_point[point]
        ]
        table = ["| what was done | what happens | within | test |", "|---|---|---|---|", *rows]
        parts.append(f"## {point[0].upper()}{point[1:]}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
