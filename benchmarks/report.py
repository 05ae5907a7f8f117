"""The time and memory to report on a run of a million spans, and to show a page of ten thousand.

    python benchmarks/report.py            # a table
    python benchmarks/report.py --json     # one JSON object

vgen's own sink writes the run: steps of a thousand spans, most of them requests, with every request's timings. The
baseline reads the same files with `json.loads`, line by line, into a list. Each case runs in a process of its own.
Headless Chromium measures the page's first paint; without Chromium this figure is absent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vgen.generation.instrumentation import measure
from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.types import Completion, Completions, RequestTiming

SPANS, PAGE = 1_000_000, 10_000
OTHERS = 12
"""Spans of a step that are no requests."""

PLAIN = """
import json, pathlib, sys
found = [json.loads(line) for file in sorted(pathlib.Path(sys.argv[1]).glob("*.jsonl")) for line in file.open()]
print(len(found))
"""


def write(place: Path, steps: int, requests: int) -> None:
    """A run of `steps` steps with `requests` request spans each, by the library itself."""
    dice = random.Random(0)
    profiling = ProfilingContext([JsonlSink(place, max_parts=1 << 16)])
    bound = profiling.bind({semconv.ENGINE: "colocate", semconv.RANK: 0})
    for number in range(steps):
        with profiling.step(number):
            with bound.span(semconv.GENERATE) as span:
                with bound.span(semconv.ENGINE_GENERATE) as engine:
                    result = completions(requests, dice)
                with bound.span(semconv.DECODE_OUTPUTS):
                    pass
                measure(bound, engine, result, requests)
                span.set({semconv.OUTPUT_TOKENS: result.output_tokens})
            with bound.span(semconv.SLEEP, {semconv.SLEEP_LEVEL: 1, semconv.DEVICE_BYTES: 1 << 34}):
                pass
            for name in ("reward", "update"):
                with profiling.span(name):
                    pass
            with bound.span(semconv.WAKE_UP, {semconv.DEVICE_BYTES: 1 << 34}):
                pass
            with bound.span(semconv.WEIGHT_SYNC, {semconv.SYNC_BYTES: 1 << 30}):
                for phase in ("transfer", "load", "reset_cache"):
                    with bound.span(f"{semconv.WEIGHT_SYNC}.{phase}"):
                        pass
        profiling.flush(60.0)
    profiling.close(60.0)


def completions(number: int, dice: random.Random) -> Completions:
    """Requests whose lengths have a long tail, all dispatched at once."""
    now = time.monotonic_ns()
    found: list[Completion] = []
    for index in range(number):
        seconds = min(dice.lognormvariate(0.0, 0.6), 20.0)
        timing = RequestTiming(
            queued_ns=now,
            finished_ns=now + int(seconds * 1e9),
            queue=0.01,
            prefill=0.05,
            decode=seconds - 0.06 if seconds > 0.06 else 0.0,
            time_to_first_token=0.06,
            time_per_output_token=0.01,
            e2e=seconds,
        )
        tokens = [0] * max(int(seconds * 100), 1)
        found.append(
            Completion(
                prompt_index=index // 8,
                generation_index=index % 8,
                token_ids=tokens,
                finish_reason="stop",
                weight_version="7",
                request_id=f"vgen-{index}",
                timing=timing,
            )
        )
    return Completions([[0] * 64 for _ in range(-(-number // 8))], found, 8, "7")


def measured(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {status}")
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def page(folder: Path, rounds: int) -> dict[str, Any]:
    """The HTML page of a trace of `PAGE` spans: its size, and the first paint in Chromium."""
    write(folder / "page", 1, PAGE - OTHERS)
    file = folder / "page.html"
    subprocess.run([sys.executable, "-m", "vgen.cli", "trace", str(folder / "page"), "--html", str(file)], check=True)
    found: dict[str, Any] = {"spans": PAGE, "bytes": file.stat().st_size}
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from helpers.chromium import Chromium, executable

    if executable() is not None:
        with Chromium() as browser:
            paints = [browser.open(file).first_paint() for _ in range(rounds)]
        found["first_paint_seconds"] = statistics.median(paints)
        found["first_paint_slowest"] = max(paints)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--spans", type=int, default=SPANS, help="spans of the run")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case runs")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = max(options.spans // 1000, 1)
        write(folder / "run", steps, 1000 - OTHERS)
        size = sum(file.stat().st_size for file in (folder / "run").iterdir())
        report = [sys.executable, "-m", "vgen.cli", "report", str(folder / "run"), "--json"]
        cases = {"vgen report": report, "json.loads of every line": [sys.executable, "-c", PLAIN, str(folder / "run")]}
        rounds = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case, command in cases.items():
                rounds[case].append(measured(command))
        result = {
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "spans": steps * 1000,
            "bytes": size,
            "cases": {
                case: {key: statistics.median(one[key] for one in found) for key in found[0]}
                for case, found in rounds.items()
            },
            "page": page(folder, max(options.rounds, 5)),
        }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['spans']:,} spans, {size / 1e6:,.0f} MB of JSON lines")
    for case, found in result["cases"].items():
        print(f"{case:<28}{found['seconds']:>8.1f} s{found['peak_bytes'] / 1e9:>8.2f} GB")
    own = result["page"]
    paint = f", first paint {own['first_paint_seconds']:.2f} s" if "first_paint_seconds" in own else ""
    print(f"a page of {own['spans']:,} spans: {own['bytes'] / 1e6:.2f} MB{paint}")


if __name__ == "__main__":
    main()
