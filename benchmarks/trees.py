"""Two checkouts of vgen against each other: the same work in turns, by one process of each that lives throughout.

    python benchmarks/trees.py ../before              # a table: this tree / the other one
    python benchmarks/trees.py ../before --json --bound 1.03

Both run in this Python environment, with vLLM, over a tiny model: spans without a sink and to a JSONL file, generation
in process and through a server of each tree's own `vgen serve`, weight syncs in process and to that server. Pairs
A B, B A, ... are added until every 95 % interval of the geometric mean is within ±`--precision`, at least `--least`,
until `--minutes` are over; see pairs.py. While one tree works, all processes of the other one are stopped (SIGSTOP),
because idle threads of OpenMP spin. `--processor-time` measures what the process itself used, by one thread of torch,
which other work on the machine changes less. The exit code is 1 unless each ratio is decided and at or below `--bound`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from pairs import interval

PROMPTS, TOKENS, SPANS, SYNCS = 64, 32, 20_000, 10
PROCESSOR_TIME = "TREES_PROCESSOR_TIME"
SHARE = 0.15
"""Of a GPU's memory, for each of the four engines; without effect on a CPU."""
ROOT = Path(__file__).parents[1]


def seconds(function: Callable[[], object]) -> float:
    clock = time.process_time if os.environ.get(PROCESSOR_TIME) else time.perf_counter
    start = clock()
    function()
    return clock() - start


def work(folder: str) -> dict[str, Callable[[], object]]:
    """What one tree does, by name; run in the tree's own process."""
    import torch

    from vgen import ColocateGeneration, ProfilingContext, Sampling, ServerGeneration
    from vgen.profiling.sinks.jsonl import JsonlSink
    from vgen.testing import tiny_model

    torch.set_num_threads(1 if os.environ.get(PROCESSOR_TIME) else 2)
    model, _ = tiny_model(f"{folder}/model", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    prompts = [[1 + (i * 31 + j) % 250 for j in range(32)] for i in range(PROMPTS)]
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
    options: dict[str, Any] = {"max_model_length": 128, "max_num_seqs": PROMPTS, "gpu_memory_utilization": SHARE}
    recording = ProfilingContext([JsonlSink(f"{folder}/generation")])
    colocate = ColocateGeneration(model, profiling=recording, **options)
    serve = [sys.executable, "-m", "vgen.cli", "serve", f"{folder}/model", "--port", "0", "--quiet", "--json"]
    serve += ["--max-model-len", "128", "--kv-cache-memory-bytes", str(1 << 28), "--dtype", "float32"]
    serve += ["--gpu-memory-utilization", str(SHARE)]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    described = json.loads(server.stdout.readline())
    key = Path(described["control_key_file"]).read_text().strip()
    remote = ServerGeneration(model, base_urls=described["url"], control_key=key, profiling=recording)

    def spans(profiling: ProfilingContext) -> None:
        for _ in range(SPANS):
            with profiling.span("work", {"a": 1, "b": "two"}):
                pass

    def syncs(generation: Any) -> None:
        for _ in range(SYNCS):
            generation.sync_weights(verify="none")

    without, jsonl = ProfilingContext([]), ProfilingContext([JsonlSink(f"{folder}/spans")])
    return {
        "spans without a sink": lambda: spans(without),
        "spans to JSONL": lambda: spans(jsonl),
        "generation in process": lambda: colocate.generate(prompts, sampling),
        "generation by a server": lambda: remote.generate(prompts, sampling),
        "weight syncs in process": lambda: syncs(colocate),
        "weight syncs to a server": lambda: syncs(remote),
        "end": lambda: (remote.close(), colocate.close(), server.terminate(), server.wait()),
    }


def serve_work() -> None:
    """Answer each name that is read from standard input with the seconds that the work took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to standard output
    with tempfile.TemporaryDirectory() as folder:
        tasks = work(folder)
        for task in tasks.values():
            if task is not tasks["end"]:
                task()  # warms up
        print(json.dumps([name for name in tasks if name != "end"]), file=answers)
        for line in sys.stdin:
            task = tasks[line.strip()]
            print(seconds(task) if task is tasks["end"] else min(seconds(task) for _ in range(2)), file=answers)


def write_metadata(root: Path, folder: Path) -> str:
    """Describe the checkout's own plugins to Python, as its installation would; returns the folder to import from."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    metadata = folder / "vgen-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vgen\nVersion: 0\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return str(folder)


class Tree:
    """A process that does the work of one checkout."""

    def __init__(self, root: Path) -> None:
        self._metadata = tempfile.TemporaryDirectory()
        paths = [str(root / "src"), write_metadata(root, Path(self._metadata.name)), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(filter(None, paths))
        environment = {**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__, "--work"], env=environment, **pipes)
        self.tasks: list[str] = json.loads(self._answer())
        main = psutil.Process(self._process.pid)
        self._processes = [main, *main.children(recursive=True)]
        self.stop()

    def stop(self) -> None:
        for process in self._processes:
            process.suspend()

    def resume(self) -> None:
        for process in reversed(self._processes):
            process.resume()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            sys.exit(f"the process of a tree ended with {self._process.wait()}")
        return line

    def __call__(self, task: str) -> float:
        assert self._process.stdin is not None
        self.resume()
        self._process.stdin.write(task + "\n")
        self._process.stdin.flush()
        took = float(self._answer())
        if task != "end":
            self.stop()
        return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="the other checkout")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--bound", type=float, default=1.03)
    parser.add_argument("--precision", type=float, default=0.03)
    parser.add_argument("--least", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--processor-time", action="store_true", help="of the process, instead of wall time")
    parser.add_argument("--only", action="append", help="of the tasks; may be given several times")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        serve_work()
        return 0
    if options.processor_time:
        os.environ |= {PROCESSOR_TIME: "1", "OMP_NUM_THREADS": "1"}
    trees = [Tree(ROOT), Tree(options.before.resolve())]
    tasks = [task for task in trees[0].tasks if not options.only or task in options.only]
    ratios: dict[str, list[float]] = {task: [] for task in tasks}
    took: dict[str, list[list[float]]] = {task: [[], []] for task in tasks}
    ends = time.monotonic() + 60 * options.minutes
    undecided = list(tasks)
    while undecided and time.monotonic() < ends:
        for task in undecided:
            order = (0, 1) if len(ratios[task]) % 2 == 0 else (1, 0)
            pair = dict(sorted((index, trees[index](task)) for index in order))
            ratios[task].append(pair[0] / pair[1])
            for index in order:
                took[task][index].append(pair[index])
        least = [task for task in undecided if len(ratios[task]) < options.least]
        wide = [task for task in undecided if interval(ratios[task])["reach"] > options.precision]
        undecided = [task for task in undecided if task in least or task in wide]
    for tree in trees:
        tree("end")
    result = {
        task: interval(ratios[task])
        | {"seconds": sorted(took[task][0])[len(took[task][0]) // 2], "decided": task not in undecided}
        for task in tasks
    }
    met = all(each["decided"] and each["ratio"] <= options.bound for each in result.values())
    if options.json:
        print(json.dumps({"bound": options.bound, "met": met, "cores": os.cpu_count(), "tasks": result}, indent=1))
    else:
        print("| | this / other | 95 % interval | pairs | seconds |\n|---|---:|---:|---:|---:|")
        for task, each in result.items():
            shown = f"{each['ratio']:.3f} | {each['low']:.3f} to {each['high']:.3f} | {each['pairs']}"
            print(f"| {task} | {shown} | {each['seconds']:.3f} |" + ("" if each["decided"] else " not decided"))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
