"""What users import of vgen is written down: README, docs and examples import from the public modules alone."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE = runpy.run_path(str(ROOT / "scripts" / "reference.py"))
DOORS: dict[str, list[str]] = REFERENCE["DOORS"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.py"))]
WIDEST = 16
"""Parameters of a constructor, `self` not counted."""
TRLS = 25 + 3
"""`TRLGeneration` has all parameters of TRL's own class, and three more."""


def imports(code: str) -> list[tuple[str, str]]:
    """`(module, name)` of everything that the code imports from vgen."""
    nodes = [*ast.walk(ast.parse(code))]
    froms = [
        (node.module or "", alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    plain = [(alias.name, "") for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return [(module, name) for module, name in [*froms, *plain] if module.split(".")[0] == "vgen"]


def code_of(page: Path) -> list[str]:
    text = page.read_text()
    return [text] if page.suffix == ".py" else re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_import_from_the_public_modules_alone(page):
    for code in code_of(page):
        for module, name in imports(code):
            assert module in DOORS, f"{page.name} imports {module}"
            assert not name or name in REFERENCE["names"](module), f"{page.name} imports {name} from {module}"


def test_the_pages_do_import_something():
    assert len({pair for page in PAGES for code in code_of(page) for pair in imports(code)}) > 10


@pytest.mark.parametrize("door", DOORS)
def test_each_public_name_exists_and_has_a_docstring(door):
    module = import_module(door)
    assert module.__doc__
    for name in REFERENCE["names"](door):
        member = getattr(module, name)
        if inspect.isclass(member) or inspect.isfunction(member) or inspect.ismodule(member):
            assert (member.__doc__ or "").strip(), f"{door}.{name}"


def test_the_reference_is_up_to_date():
    assert (ROOT / "docs" / "reference.md").read_text() == REFERENCE["page"](), "run: python scripts/reference.py"


@pytest.mark.parametrize("path", sorted((ROOT / "src" / "vgen").rglob("*.py")), ids=lambda path: path.stem)
def test_no_constructor_has_too_many_parameters(path):
    for kind in ast.walk(ast.parse(path.read_text())):
        for node in kind.body if isinstance(kind, ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - 1
                assert count <= (TRLS if kind.name == "TRLGeneration" else WIDEST), (
                    f"{kind.name} has {count} parameters"
                )
