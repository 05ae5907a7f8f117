"""Changes one place of the source at a time and counts the changes that the tests notice.

    python scripts/mutants.py                  run what is missing of the draw, write docs/results/mutants.json
    python scripts/mutants.py --list           the draw
    python scripts/mutants.py --only ID ...    run these again, whatever they were

300 mutants are drawn, 50 from each of six rooms. A mutant's place in the draw follows from its own text, so that a
change elsewhere leaves the draw as it is. Each runs in a copy of the tree, against the short tests of its module and
those that reach the changed function. Texts, messages and types are left alone: see `Mutations`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import fnmatch
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("weights", "distributed", "engines/client", "generation", "recordings", "profiling")
PER_ROOM = 50
SEED = "16"
RESULTS = ROOT / "docs" / "results" / "mutants.json"
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.json"
"""Mutants that no test can catch, each with the reason. They are replaced by the next of their room."""
LEFT_OUT = {
    "weights/load/copy_kernel.py": "runs only on CUDA: tests/gpu",
    "profiling/semconv_docs.py": "writes a page of the documentation, which a test compares",
    "*/__init__.py": "imports",
}
SURVIVED = ("survives", "no test")
SELECTION = "not slow and not real"
BUDGET = 30.0
"""Seconds of tests for one mutant that reach its function, and of such that import its module."""
PRELOADED = ("pytest", "hypothesis.extra.numpy", "torch", "transformers", "vllm", "vllm.engine.llm_engine", "aiohttp")

COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
OPPOSITE = {"min": "max", "max": "min", "any": "all", "all": "any"}
LOGGING = ("debug", "info", "warning", "error", "exception", "critical")
SYMMETRIC = ("compare_digest", "getattr", "setattr", "hasattr", "max", "min", "print")


@dataclass(frozen=True)
class Mutant:
    """One change of one place."""

    id: str
    room: str
    module: str
    """Its path below src/vgen."""
    function: str
    """Its qualified name; empty for the module itself and for a class's body."""
    line: int
    operator: str
    before: str
    after: str
    start: int
    end: int
    """Where `before` stands in the file, in bytes."""


class Mutations(ast.NodeVisitor):
    """All changes of a module: what tests cannot or need not see is left alone.

    That is: texts and what only makes texts (f-strings, `__repr__`, what is raised, log calls), annotations, imports,
    decorators, `zip`'s `strict`, and floats (seconds and tolerances whose exact size nobody promises).
    """

    def __init__(self, source: bytes) -> None:
        self.found: list[tuple[str, str, ast.AST, str]] = []
        """Function, operator, node, its new text."""
        self._function: list[str] = []
        self._in_function = False
        self.visit(ast.parse(source))

    def _add(self, operator: str, node: ast.AST, after: ast.AST | str) -> None:
        text = after if isinstance(after, str) else f"({ast.unparse(after)})"
        name = ".".join(self._function) if self._in_function else ""
        self.found.append((name, operator, node, text))

    # --- what is left alone ---

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    visit_Import = visit_ImportFrom = visit_TypeAlias = visit_JoinedStr

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.name in ("__repr__", "__str__"):
            return
        was, outer = self._in_function, self._function
        self._function = [*outer, *(["<locals>"] if was else []), node.name]
        self._in_function = True
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self._in_function, self._function = was, outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        was, outer = self._in_function, self._function
        self._function = [*outer, *(["<locals>"] if was else []), node.name]
        self._in_function = False
        for statement in node.body:
            self.visit(statement)
        self._in_function, self._function = was, outer

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return
        self._condition(node.test)
        self.generic_visit(node)

    # --- statements ---

    def visit_Raise(self, node: ast.Raise) -> None:
        self._add("no raise", node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        value = node.value.value if isinstance(node.value, ast.Await) else node.value
        if isinstance(value, ast.Call):
            if isinstance(value.func, ast.Attribute) and value.func.attr in LOGGING:
                return
            self._add("no call", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Name) and target.id.startswith("__") for target in node.targets):
            return
        if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets) and self._in_function:
            self._add("no assignment", node, "pass")
        is_alias = not self._in_function and isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.BitOr)
        if not is_alias:
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add("no assignment", node, "pass")
        self.visit(node.value)

    def visit_Delete(self, node: ast.Delete) -> None:
        self._add("no deletion", node, "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self._add("continue for break", node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._add("break for continue", node, "break")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None:
            self._add("no return", node, "pass")
            return
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._add("return None", node, "return None")
        self.visit(node.value)

    # --- expressions ---

    def _condition(self, test: ast.expr) -> None:
        if isinstance(test, (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.NamedExpr)):
            self._add("condition negated", test, f"(not ({ast.unparse(test)}))")

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._condition(test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for number, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                changed = copy.copy(node)
                changed.ops = [*node.ops[:number], other(), *node.ops[number + 1 :]]
                self._add("comparison", node, changed)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        changed = copy.copy(node)
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._add("and for or", node, changed)
        for value in node.values:
            self._condition(value)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add("no not", node, node.operand)
        elif isinstance(node.op, ast.USub):
            self._add("no minus", node, node.operand)
            return
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        text = any(
            isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, (str, bytes)))
            for side in (node.left, node.right)
        )
        if type(node.op) in ARITHMETIC and not text:
            changed = copy.copy(node)
            changed.op = ARITHMETIC[type(node.op)]()
            self._add("arithmetic", node, changed)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add("other bool", node, str(not node.value))
        elif isinstance(node.value, int):
            self._add("off by one", node, str(node.value + 1))

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in LOGGING or name in ("TypeVar", "ParamSpec", "cast"):
            return
        if name in ("isinstance", "issubclass"):
            self.visit(node.args[0])
            return
        if name == "zip":  # its `strict` only asserts
            for argument in node.args:
                self.visit(argument)
            return
        if name in OPPOSITE and isinstance(node.func, ast.Name):
            self._add("opposite", node.func, OPPOSITE[name])
        first = node.args[:2]
        differ = len({ast.dump(argument) for argument in first}) == 2
        if differ and name not in SYMMETRIC and not any(isinstance(argument, ast.Starred) for argument in first):
            changed = copy.copy(node)
            changed.args = [node.args[1], node.args[0], *node.args[2:]]
            self._add("arguments swapped", node, changed)
        self.generic_visit(node)


def mutants_of(room: str, seed: str = SEED) -> list[Mutant]:
    """All of a room's mutants, in the order in which they are drawn."""
    found = []
    for path in sorted((ROOT / "src" / "vgen" / room).rglob("*.py")):
        module = str(path.relative_to(ROOT / "src" / "vgen"))
        if any(fnmatch.fnmatch(module, pattern) for pattern in LEFT_OUT):
            continue
        source = path.read_bytes()
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        seen: dict[str, int] = {}
        for function, operator, node, after in Mutations(source).found:
            start, end = (
                starts[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
                starts[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
            )
            before = source[start:end].decode()
            key = "\0".join([seed, module, function, operator, " ".join(before.split()), after])
            seen[key] = seen.get(key, 0) + 1  # the same text again in the same function
            identity = hashlib.sha256(f"{key}\0{seen[key]}".encode()).hexdigest()[:12]
            line = source.count(b"\n", 0, start) + 1
            found.append(Mutant(identity, room, module, function, line, operator, before, after, start, end))
    return sorted(found, key=lambda mutant: mutant.id)


def draw(seed: str = SEED) -> list[Mutant]:
    """The mutants that count: `PER_ROOM` of each room that are not listed as equivalent, the rooms in turn."""
    equivalent = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    chosen = ([m for m in mutants_of(room, seed) if m.id not in equivalent][:PER_ROOM] for room in ROOMS)
    return [mutant for turn in zip(*chosen, strict=True) for mutant in turn]


# --- in a child process: pytest on a copy ----------------------------------------------------------------------------


REACHED = "VGEN_MUTANTS_REACHED"
TRACER = """
import os, sys, threading

class Tracer:
    def __init__(self, source, place):
        self.source, self.place, self.names = source, place, {}
        sys.settrace(self)
        threading.settrace(self)

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if id(code) not in self.names:
            self.names[id(code)] = code
            if code.co_filename.startswith(self.source):
                with open(self.place, "a") as file:
                    file.write(f"{code.co_filename[len(self.source):]}::{code.co_qualname}\\n")

if os.environ.get("VGEN_MUTANTS_REACHED"):
    Tracer(*os.environ["VGEN_MUTANTS_REACHED"].split(os.pathsep))
"""
"""Writes the functions of vgen that a process calls: as `sitecustomize`, also in the processes that tests start."""


class Reached:
    """A pytest plugin: which functions of vgen each test calls, whether it passes, and how long it takes."""

    def __init__(self, source: str, folder: Path) -> None:
        self.tests: dict[str, dict] = {}
        self._source, self._place = source, folder / "functions"
        self._tracer: dict = {}
        (folder / "sitecustomize.py").write_text(TRACER)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
        exec(TRACER, self._tracer)

    def pytest_runtest_protocol(self, item, nextitem) -> None:
        self._place.write_text("")
        os.environ[REACHED] = os.pathsep.join([self._source, str(self._place)])
        self._tracer["Tracer"](self._source, self._place)

    def pytest_runtest_logreport(self, report) -> None:
        test = self.tests.setdefault(report.nodeid, {"seconds": 0.0, "passed": True})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        test["passed"] = test["passed"] and report.outcome == "passed"
        if report.when == "teardown":
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            test["functions"] = sorted(set(self._place.read_text().split()))


class Chosen:
    """A pytest plugin: runs the chosen tests alone, in their order, and keeps the first that fails."""

    def __init__(self, tests: list[str]) -> None:
        self.failed: str | None = None
        self._order = {test: number for number, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._order), key=lambda item: self._order[item.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def child(tree: Path, answer: Path, log: Path, tests: list[str] | None, files: list[str]) -> int:
    """Fork a process that runs pytest in `tree` and writes an answer. Returns its id, which is its group's as well."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        with log.open("wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(tree)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        paths = [str(tree / "src"), str(tree / "tests")]
        sys.path[:0] = paths
        sys.argv = ["pytest"]
        os.environ |= {
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": str(answer.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        os.environ["VGEN_MUTANTS"] = str(os.getpid())
        tempfile.tempdir = None
        sys.dont_write_bytecode = True
        import pytest

        arguments = ["-q", "-p", "no:cacheprovider", "--tb=short", "-m", SELECTION, *files]
        if tests is None:
            plugin = Reached(f"{tree}/src/vgen/", answer.parent)
            status = int(pytest.main(arguments, plugins=[plugin]))
            answer.write_text(json.dumps(plugin.tests))
        else:
            chosen = Chosen(tests)
            # A test that hangs must not take the other tests' time.
            status = int(pytest.main(["-x", "--timeout=60", *arguments], plugins=[chosen]))
            import vgen

            assert vgen.__file__.startswith(str(tree)), vgen.__file__
            answer.write_text(json.dumps({"status": status, "failed": chosen.failed}))
    finally:
        sys.stdout.flush()
        os._exit(status)


def end(pid: int) -> None:
    """Kill a child with all that it started, also what has left its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    mine = f"VGEN_MUTANTS={pid}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mine in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


# --- the run ---------------------------------------------------------------------------------------------------------


def copy_tree(to: Path) -> Path:
    """A copy of the tree's files, tracked and new."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def preload() -> None:
    """Import what all tests need, so that a child need not, and nothing of vgen."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            __import__(name)
    assert not any(name.partition(".")[0] == "vgen" for name in sys.modules)
    gc.freeze()


def reached(work: Path, tree: Path) -> dict[str, dict]:
    """Every short test with the functions that it calls. Only files that have changed run again."""
    cache = work / "reached.json"
    known: dict[str, dict] = json.loads(cache.read_text()) if cache.exists() else {}
    everywhere = hashlib.sha256((tree / "tests" / "conftest.py").read_bytes())
    stale = []
    for path in sorted((tree / "tests").rglob("test_*.py")):
        name = str(path.relative_to(tree))
        digest = everywhere.copy()
        digest.update(path.read_bytes())
        if path.parent.name != "gpu" and known.get(name, {}).get("digest") != digest.hexdigest():
            stale.append(name)
            known[name] = {"digest": digest.hexdigest(), "tests": {}}
    if stale:
        print(f"running {len(stale)} test files to see what they reach", flush=True)
        answer = work / "reached.answer"
        pid = child(tree, answer, work / "reached.log", None, stale)
        os.waitpid(pid, 0)
        end(pid)
        for test, found in json.loads(answer.read_text()).items():
            known[test.partition("::")[0]]["tests"][test] = found
        cache.write_text(json.dumps(known))
    tests = {test: found for file in known.values() for test, found in file["tests"].items()}
    broken = sorted(test for test, found in tests.items() if not found["passed"])
    print(f"{len(tests)} tests, {len(broken)} left out because they do not pass here: {broken}", flush=True)
    for found in tests.values():
        found["functions"] = {name[:end] for name in found["functions"] for end in _ends(name)}
    return {test: found for test, found in tests.items() if found["passed"]}


def _ends(name: str) -> list[int]:
    """Where the names of a function and of those around it end: whoever reaches it reaches them."""
    return [match.start() for match in re.finditer(r"\.<locals>\.|$", name)]


def tests_for(mutant: Mutant, tests: dict[str, dict]) -> list[str]:
    """The tests of the mutant's own module, then others: the quickest that reach its function, then importers.

    No test reaches what runs when a module is imported.
    """
    path = Path("tests") / mutant.module
    own_file = f"{path.with_name('test_' + path.name)}::"
    function = f"{mutant.module}::{mutant.function}"

    def reaches(test: str) -> bool:
        return function in tests[test]["functions"]

    def imports(test: str) -> bool:
        return _names(ROOT / test.partition("::")[0], path.stem)

    def order(test: str) -> tuple[bool, float]:
        return not test.startswith(f"{path.parent}/"), tests[test]["seconds"]

    own = [test for test in tests if test.startswith(own_file)]
    chosen = sorted(own, key=lambda test: (not reaches(test), tests[test]["seconds"]))
    for counts in (reaches, imports):
        spent = 0.0
        for test in sorted(filter(counts, tests.keys() - chosen), key=order):
            spent += tests[test]["seconds"] + 0.02
            if spent > BUDGET:
                break
            chosen.append(test)
    files = list(dict.fromkeys(test.partition("::")[0] for test in chosen))
    return sorted(chosen, key=lambda test: files.index(test.partition("::")[0]))


@functools.cache
def _names(path: Path, module: str) -> bool:
    """Whether a test file names a module, as it must to import it."""
    return path.exists() and re.search(rf"\b{module}\b", path.read_text(encoding="utf-8")) is not None


@dataclass
class Job:
    """A mutant that runs in one of the copies."""

    mutant: Mutant
    tree: Path
    folder: Path
    pid: int
    tests: int
    limit: float
    began: float

    def result(self, status: int | None) -> dict:
        answer = self.folder / "answer"
        found = json.loads(answer.read_text()) if answer.exists() else {}
        outcome = {None: "hangs", 0: "survives", 5: "no test"}.get(status, "caught")
        return {
            **{key: value for key, value in asdict(self.mutant).items() if key not in ("start", "end")},
            "outcome": outcome,
            "by": found.get("failed"),
            "tests": self.tests,
            "seconds": round(time.monotonic() - self.began, 1),
        }


def start(mutant: Mutant, tree: Path, folder: Path, tests: dict[str, dict]) -> Job:
    chosen = tests_for(mutant, tests)
    files = list(dict.fromkeys(test.partition("::")[0] for test in chosen))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = (ROOT / "src" / "vgen" / mutant.module).read_bytes()
    changed = source[: mutant.start] + mutant.after.encode() + source[mutant.end :]
    ast.parse(changed)
    (tree / "src" / "vgen" / mutant.module).write_bytes(changed)
    limit = 120 + 8 * sum(tests[test]["seconds"] for test in chosen)
    pid = child(tree, folder / "answer", folder / "log", chosen, files or ["tests/test_errors.py"])
    return Job(mutant, tree, folder, pid, len(chosen), limit, time.monotonic())


def ended(jobs: list[Job]) -> Iterator[tuple[Job, dict]]:
    for job in jobs:
        pid, status = os.waitpid(job.pid, os.WNOHANG)
        if not pid and time.monotonic() - job.began < job.limit:
            continue
        end(job.pid)
        if not pid:
            os.waitpid(job.pid, 0)
        yield job, job.result(os.waitstatus_to_exitcode(status) if pid else None)
        # Back to the tree's own text.
        shutil.copyfile(ROOT / "src" / "vgen" / job.mutant.module, job.tree / "src" / "vgen" / job.mutant.module)


def run(
    drawn: list[Mutant],
    waiting: list[Mutant],
    work: Path,
    jobs: int,
    minutes: float,
    results: dict[str, dict],
    out: Path,
) -> None:
    """Run the mutants that wait, until the time is over. Each result is written at once."""
    deadline = time.monotonic() + minutes * 60
    trees = [copy_tree(Path(tempfile.mkdtemp(prefix="tree-", dir=work))) for _ in range(jobs)]
    preload()
    tests = reached(work, trees[0])
    running: list[Job] = []
    try:
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                tree = next(tree for tree in trees if all(job.tree != tree for job in running))
                running.append(start(waiting.pop(0), tree, work / f"run-{tree.name}", tests))
            for job, result in list(ended(running)):
                running.remove(job)
                results[job.mutant.id] = result
                print(f"{result['outcome']:9} {result['seconds']:6} s  {described(job.mutant)}", flush=True)
                if result["outcome"] == "survives":
                    shutil.copyfile(job.folder / "log", work / f"{job.mutant.id}.log")
                write(drawn, results, out)
            time.sleep(0.1)
    finally:
        for job in running:
            end(job.pid)
        for tree in trees:
            shutil.rmtree(tree, ignore_errors=True)


def described(mutant: Mutant) -> str:
    before, after = (" ".join(text.split())[:90] for text in (mutant.before, mutant.after))
    return f"{mutant.id} {mutant.module}:{mutant.line} {mutant.function}  {mutant.operator}: {before}  ->  {after}"


def write(drawn: list[Mutant], results: dict[str, dict], out: Path) -> None:
    """The results of what is drawn now, with their sums."""
    kept = [results[mutant.id] for mutant in drawn if mutant.id in results]
    rooms = {}
    for room in ROOMS:
        outcomes = [result["outcome"] for result in kept if result["room"] == room]
        survive = sum(outcome in SURVIVED for outcome in outcomes)
        rooms[room] = {"run": len(outcomes), "caught": len(outcomes) - survive, "survive": survive}
    total = {key: sum(room[key] for room in rooms.values()) for key in ("run", "caught", "survive")}
    part = {
        "drawn": len(drawn),
        **total,
        "caught_share": round(total["caught"] / max(total["run"], 1), 3),
        "rooms": rooms,
    }
    text = json.dumps({**part, "mutants": kept}, indent=1)
    out.with_suffix(".new").write_text(text + "\n")
    out.with_suffix(".new").replace(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutants", help="what a later run takes up again")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=150.0)
    parser.add_argument("--only", nargs="+", help="run these mutants, also if they have run")
    parser.add_argument("--survivors", action="store_true", help="run again also those that survived")
    parser.add_argument("--seed", default=SEED, help="another draw, to see what the usual one does not; with --out")
    parser.add_argument("--list", action="store_true", help="print the draw and run nothing")
    arguments = parser.parse_args()
    drawn = draw(arguments.seed)
    if arguments.list:
        print("\n".join(described(mutant) for mutant in drawn))
        return 0
    results = {}
    if arguments.out.exists():
        results = {result["id"]: result for result in json.loads(arguments.out.read_text())["mutants"]}
    if arguments.only:
        everything = (mutant for room in ROOMS for mutant in mutants_of(room, arguments.seed))
        waiting = [mutant for mutant in everything if mutant.id in arguments.only]
    else:
        done = {k for k, each in results.items() if not (arguments.survivors and each["outcome"] in SURVIVED)}
        waiting = [mutant for mutant in drawn if mutant.id not in done]
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.nice(10)
    run(drawn, waiting, arguments.work.resolve(), arguments.jobs, arguments.minutes, results, arguments.out)
    write(drawn, results, arguments.out)
    sums = json.loads(arguments.out.read_text())
    print(f"{sums['run']} of {sums['drawn']} have run, {sums['caught_share']:.1%} caught: {sums['rooms']}")
    return 0 if sums["caught_share"] >= 0.9 and sums["run"] == sums["drawn"] else 1


if __name__ == "__main__":
    sys.exit(main())
