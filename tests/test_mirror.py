"""The tests mirror the source tree, and no test waits for time to pass."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "vgen"
SMALL = 60
"""Lines up to which a module may be tested by the tests of the modules that use it."""
OF_THE_PROJECT = {"docs", "faults", "imports", "mirror", "mutants", "packaging", "public_surface"}
"""Test files at the top that test the project as a whole, and not one module."""
NEEDS_CUDA = {"weights/load/test_copy_kernel.py"}
"""Test files of modules that run only on a GPU: tests/gpu tests them."""
SEVERAL_MODULES: dict[str, str] = {
    # Test files of a folder that test several of its modules together, each with what it tests.
    "checks/test_page.py": "docs/check.md",
    "dashboards/test_page.py": "docs/dashboards.md",
    "distributed/test_calls_in_steps.py": "calls of leader ranks that are held at one step, and their connections",
    "engines/client/test_many_callers.py": "the client's engine under many threads and tasks",
    "profiling/sinks/test_every_sink.py": "the contract that all sinks keep",
    "profiling/sinks/test_otel_faults.py": "the OpenTelemetry sink with a dead, slow or raising backend",
    "profiling/sinks/test_wandb_faults.py": "the W&B sink with a dead, slow or raising backend",
    "profiling/test_faults.py": "a context with sinks that raise, block or die",
    "profiling/test_processes.py": "contexts across fork, spawn and pickle",
    "recordings/test_older_format.py": "runs of format 1 through every command that reads them",
}
SIMULATED_SLOWNESS: dict[str, tuple[int, str]] = {
    # Sleeps that are the slowness of a fake, and never a wait: how many in each file, and what they simulate.
    "helpers/ranks_gloo.py": (1, "a rank that comes too late"),
}
NOT_MIRRORED = ("real", "gpu", "helpers", "fuzz")


def mirrored_path(module: Path) -> str:
    """The path of a module's test file below tests/."""
    path = module.relative_to(SOURCE)
    return str(path.with_name(f"test_{path.name}"))


MODULES = {mirrored_path(path): path for path in SOURCE.rglob("*.py") if path.stem != "__init__"}
TEST_FILES = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}


@pytest.mark.parametrize("test_file", sorted(MODULES))
def test_every_module_has_its_test_file(test_file: str):
    lines = len(MODULES[test_file].read_text().splitlines())
    assert lines <= SMALL or test_file in TEST_FILES | NEEDS_CUDA, f"tests/{test_file} is missing"


def test_every_test_file_has_its_module():
    mirrored = {name for name in TEST_FILES if Path(name).parts[0] not in NOT_MIRRORED}
    mirrored -= {f"test_{name}.py" for name in OF_THE_PROJECT} | SEVERAL_MODULES.keys()
    assert mirrored <= MODULES.keys(), mirrored - MODULES.keys()
    assert SEVERAL_MODULES.keys() <= TEST_FILES - MODULES.keys()


def sleeps(path: Path) -> list[int]:
    """The lines that call `time.sleep`, or a `sleep` that was imported from `time`."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if ast.unparse(call.func) in ("time.sleep", "sleep")]


def test_no_test_waits_by_sleeping():
    """`helpers.waiting.wait_until` waits for what a test needs."""
    found = {str(path.relative_to(TESTS)): lines for path in TESTS.rglob("*.py") if (lines := sleeps(path))}
    allowed = Counter({name: count for name, (count, _) in SIMULATED_SLOWNESS.items()})
    too_many = {name: lines for name, lines in found.items() if len(lines) > allowed[name]}
    assert not too_many, "sleeps (file: lines) instead of wait_until"
    assert allowed == {name: len(lines) for name, lines in found.items()}, "take away what is no longer needed"


def test_no_test_skips_for_want_of_a_module_of_the_project():
    """`importorskip` of a helper that has moved would skip its tests for ever."""
    ours = {"vgen", "helpers", "conftest", *(path.stem for path in (TESTS / "helpers").glob("*.py"))}
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
                name = ast.literal_eval(node.args[0]).partition(".")[0]
                assert name not in ours, f"{path.relative_to(TESTS)}:{node.lineno} skips without {name}"
