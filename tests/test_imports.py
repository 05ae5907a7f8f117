"""The import path is the feature flag, dependencies point one way, and nothing knows a trainer."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vgen

SOURCE = Path(__file__).parent.parent / "src" / "vgen"
HEAVY = {
    "accelerate", "ddsketch", "deepspeed", "grafana_foundation_sdk", "mlflow", "numpy", "opentelemetry", "peft", "ray",
    "rich", "torch", "trackio", "transformers", "trl", "vllm", "wandb", "wandb_workspaces", "yaml",
}  # fmt: skip
MODULES = sorted(SOURCE.rglob("*.py"))


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_the_standard_library_alone_and_takes_under_50_ms():
    code = (
        # processor time: what other processes take of the machine is not the import's
        "import sys, time; before = set(sys.modules); start = time.process_time(); import vgen;"
        "took = time.process_time() - start; new = {n.partition('.')[0] for n in set(sys.modules) - before};"
        "print(took); print(*sorted(new - set(sys.stdlib_module_names) - {'vgen'}))"
    )
    runs = [python(code).split("\n") for _ in range(5)]
    assert {run[1] for run in runs} == {""}
    assert min(float(run[0]) for run in runs) < 0.05


def test_the_front_doors_light_names_load_nothing_heavy():
    code = (
        "import sys; from vgen import ProfilingContext, Sampling, PromptError, Sink, ColocateGeneration;"
        "p = ProfilingContext.disabled(); p.span('x').__enter__();"
        f"print(*({HEAVY!r} & {{n.partition('.')[0] for n in sys.modules}}))"
    )
    assert python(code).strip() == ""


def test_profiling_works_without_anything_heavy():
    code = (
        "import sys; from vgen.profiling import ProfilingContext; from vgen.profiling.sinks.jsonl import JsonlSink\n"
        "import tempfile; p = ProfilingContext([JsonlSink(tempfile.mkdtemp())])\n"
        "with p.step(1) as row:\n    with p.span('x'): pass\n"
        "row.summary(); p.close()\n"
        f"print(*(({HEAVY!r} - {{'ddsketch'}}) & {{n.partition('.')[0] for n in sys.modules}}))"
    )
    assert python(code).strip() == ""


@pytest.mark.parametrize(
    ("module", "line", "says"),
    [
        ("opentelemetry", "import vgen.profiling.sinks.otel", "vgen[otel]"),
        ("opentelemetry.sdk", "import vgen.profiling.sinks.otel_sdk", "vgen[otlp]"),
        ("opentelemetry.exporter.prometheus", "import vgen.profiling.sinks.prometheus", "vgen[otlp]"),
        ("vllm", "from vgen.engines.colocate import ColocateEngine; ColocateEngine('x')", "vgen[cpu]"),
    ],
)
def test_a_missing_extra_fails_where_it_is_used_and_says_what_to_install(module, line, says):
    code = f"import sys; sys.modules[{module!r}] = None\ntry:\n    {line}\nexcept ImportError as error: print(error)"
    assert says in python(code)


# The map: each layer may import what comes after it, never back.
LAYERS = [
    {"cli", "demo", "integrations", "testing"},
    {"generation", "rollout", "analysis", "viewers", "dashboards"},
    {"engines", "weights", "ranks"},
    {"profiling"},
    {"types", "errors"},
]


def layer_of(module: str) -> int:
    first = vgen._HOMES.get(module, module).partition(".")[0]
    return next((depth for depth, layer in enumerate(LAYERS) if first in layer), -1)


def imports(path: Path):
    """The vgen modules that a file imports, as dotted names below vgen."""
    package = list(path.relative_to(SOURCE).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield from (".".join([*base, *([node.module] if node.module else [alias.name])]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vgen"):
            yield node.module.removeprefix("vgen").removeprefix(".")
        elif isinstance(node, ast.Import):
            yield from (alias.name[5:] for alias in node.names if alias.name.startswith("vgen."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_dependencies_point_one_way(path):
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    if module == "__init__":
        return
    mine = layer_of(module)
    assert mine >= 0, f"{module} has no place in the map"
    for imported in imports(path):
        if imported in ("", "__version__"):
            continue
        assert layer_of(imported) >= mine, f"{module} imports {imported}, which lies above it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_knows_a_trainer(path):
    """No import of a trainer, no parameter for one, no attribute that keeps one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
            continue  # what vLLM calls the sending half of a weight transfer is no trainer
        if isinstance(node, ast.ImportFrom | ast.Import):
            found = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not any("trainer" in name.lower() for name in found), found
        elif isinstance(node, ast.arg):
            assert "trainer" not in node.arg.lower(), node.arg
            annotation = ast.unparse(node.annotation) if node.annotation else ""
            assert "Trainer" not in annotation, annotation
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            assert node.attr.lower().strip("_") != "trainer", node.attr


def test_no_global_provider_no_run_no_process_wide_switch():
    forbidden = {"set_tracer_provider", "set_meter_provider", "setup_logging", "basicConfig"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in forbidden, path
                assert ast.unparse(node.func) not in {"wandb.init", "mlflow.start_run", "trackio.init"}, path
