"""Imports: `import vgen` is light, rooms depend on one another in one direction, and nothing knows a trainer."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
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
        # processor time, which other processes on the machine do not change
        "import sys, time; before = set(sys.modules); start = time.process_time(); import vgen;"
        "took = time.process_time() - start; new = {n.partition('.')[0] for n in set(sys.modules) - before};"
        "print(took); print(*sorted(new - set(sys.stdlib_module_names) - {'vgen'}))"
    )
    runs = [python(code).split("\n") for _ in range(5)]
    assert {run[1] for run in runs} == {""}
    assert min(float(run[0]) for run in runs) < 0.05


def test_the_light_names_of_vgen_load_nothing_heavy():
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
        ("vllm", "from vgen.engines.inprocess.engine import ColocateEngine; ColocateEngine('x')", "vgen[cpu]"),
    ],
)
def test_a_missing_extra_fails_where_it_is_used_and_says_what_to_install(module, line, says):
    code = f"import sys; sys.modules[{module!r}] = None\ntry:\n    {line}\nexcept ImportError as error: print(error)"
    assert says in python(code)


# Every room, and the rooms that it may import from: only rooms below it.
GROUND = {"types", "padding", "arguments", "errors", "_version", "_addresses", "_output"}
PROFILING = {"profiling"}
PROTOCOL = {*PROFILING, "completion_codec", "engine_protocol"}
SYNC = {*PROTOCOL, "distributed", "weights", "weights.source", "weights.load", "weights.transports"}
SYNC |= {"weights.verification"}
ENGINES = {*SYNC, "engines"}
READER = {"profiling", "recordings"}
ROOMS: dict[str, set[str]] = {
    "cli": {"checks", "demo", "dashboards", "recordings.report", "recordings.export", "engines.server"},
    "demo": {"testing", "generation", "profiling", "profiling.sinks", "recordings.reader", "recordings.export"},
    "checks": {"testing", "profiling", "generation", "weights.source", "engines.server"},
    "testing": {*PROTOCOL, "engines.server", "profiling.sinks"},
    "integrations": {*ENGINES, "engines.client", "generation"},
    "dashboards": {"profiling", "profiling.sinks"},
    "recordings.report": {*READER, "recordings.reader"},
    "recordings.export": {*READER, "recordings.reader"},
    "recordings.reader": READER,
    "recordings": PROFILING,
    "generation": {*ENGINES, "engines.inprocess", "engines.client"},
    "engines.inprocess": ENGINES,
    "engines.client": ENGINES,
    "engines.server": ENGINES,
    "engines": SYNC,
    "weights": {"engine_protocol", "weights.source", "weights.verification"},
    "weights.transports": {*PROTOCOL, "distributed", "weights.load", "weights.source"},
    "weights.load": {*PROTOCOL, "distributed", "weights.source", "weights.verification"},
    "weights.verification": {*PROTOCOL, "weights.source"},
    "weights.source": PROTOCOL,
    "distributed": PROTOCOL,
    "engine_protocol": PROFILING,
    "completion_codec": set(),
    "profiling.sinks": PROFILING,
    "profiling": set(),
    **{room: set(GROUND) for room in GROUND},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in MODULES if path.parent != SOURCE or path.stem != "__init__"}


def room_of(module: str) -> str:
    """The room with the longest name that is a prefix of the module's; empty for none."""
    parts = module.split(".")
    return next((r for n in range(len(parts), 0, -1) if (r := ".".join(parts[:n])) in ROOMS), "")


def imports(path: Path) -> set[str]:
    """The modules of vgen that a file imports, also inside functions, for type checkers, and through `vgen`."""
    package = list(path.relative_to(SOURCE).parts[:-1])
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            elif (node.module or "").partition(".")[0] == "vgen":
                base = (node.module or "").split(".")[1:]
            else:
                continue
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                home = ".".join(base) or vgen._HOMES.get(alias.name, "_version")
                found.add(whole if whole in NAMES else home)
        elif isinstance(node, ast.Import):
            found |= {alias.name[5:] for alias in node.names if alias.name.startswith("vgen.")}
    return found


GRAPH = {name: imports(path) & NAMES.keys() - {name} for name, path in NAMES.items()}


def test_every_room_exists_and_every_module_has_one():
    rooms = {room_of(module) for module in NAMES}
    assert "" not in rooms, [module for module in NAMES if not room_of(module)]
    assert rooms == ROOMS.keys() - {"_version"} | (rooms & GROUND)


@pytest.mark.parametrize("module", sorted(NAMES))
def test_dependencies_point_one_way(module):
    mine = room_of(module)
    allowed = {mine, *ROOMS[mine], *(GROUND if mine not in GROUND else ())}
    strange = {other for other in GRAPH[module] if room_of(other) not in allowed}
    assert not strange, f"{module} imports {sorted(strange)}"


def test_the_list_of_rooms_has_no_circle():
    order = [*TopologicalSorter(ROOMS | {room: set() for room in GROUND}).static_order()]
    assert order, "graphlib raises where there is one"


def test_no_import_circle():
    graph = {name: set(imported) for name, imported in GRAPH.items()}
    circles = set[frozenset[str]]()
    while True:
        try:
            TopologicalSorter(graph).prepare()
            break
        except CycleError as error:
            circle = error.args[1]
            circles.add(frozenset(circle))
            graph[circle[1]].discard(circle[0])
    assert not circles, circles


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_knows_a_trainer(path):
    """No import of a trainer, no parameter for one, and no attribute that keeps one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
            continue  # vLLM calls the sending side of a weight transfer a trainer
        if isinstance(node, ast.ImportFrom | ast.Import):
            found = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if path.name == "trl.py" and found[-1] == "transformers":  # to wrap its methods, which get the trainer
                found = [name for name in found if name not in ("Trainer", "TrainerCallback")]
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
