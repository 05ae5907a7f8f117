"""The ratio of two commands' figures, as a geometric mean over interleaved pairs with its 95 % interval.

    python benchmarks/pairs.py --figure spans.jsonl --bound 1.03 \
        'env PYTHONPATH=src python benchmarks/overhead.py --json' \
        'env PYTHONPATH=../before/src python ../before/benchmarks/overhead.py --json'

Each command prints one JSON object on standard output. A figure is a dotted path into it; several are measured in the
same runs. The commands run in pairs, A B, B A, A B, ..., so that a machine that slows down slows both. The ratio is
first / second. Its interval comes from Student's t on the logarithms. Pairs are added until every interval is within
±`--precision`, at least `--least` of them, until `--minutes` are over. A ratio whose interval is still wider then is
"not decided". The exit code is 1 unless each ratio is decided and at or below `--bound`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any


def student_t(freedom: int, probability: float = 0.975) -> float:
    """The quantile of Student's t, by its expansion in the normal's (Abramowitz and Stegun, 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def interval(ratios: list[float]) -> dict[str, Any]:
    """Geometric mean of `ratios`, its 95 % interval, and how far that reaches, as a fraction of the mean."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    reach = student_t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    low, high = math.exp(mean - reach), math.exp(mean + reach)
    return {"ratio": math.exp(mean), "low": low, "high": high, "reach": math.expm1(reach), "pairs": len(logs)}


def run(command: str) -> Any:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def figure(result: Any, path: str) -> float:
    for key in path.split("."):
        result = result[int(key)] if isinstance(result, list) else result[key]
    return float(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="a command, as one string")
    parser.add_argument("second", help="another")
    parser.add_argument("--figure", action="append", required=True, metavar="PATH", help="may be repeated")
    parser.add_argument("--bound", type=float, default=math.inf, help="what each ratio may be at most")
    parser.add_argument("--least", type=int, default=15, help="pairs at the least")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which no pair is begun")
    parser.add_argument("--precision", type=float, default=0.03, help="half width of the interval, as a fraction")
    asked = parser.parse_args()
    ratios: dict[str, list[float]] = {path: [] for path in asked.figure}
    deadline = time.monotonic() + asked.minutes * 60
    pairs = 0
    while time.monotonic() < deadline:
        order = ("first", "second") if pairs % 2 == 0 else ("second", "first")
        results = {which: run(getattr(asked, which)) for which in order}
        pairs += 1
        for path, values in ratios.items():
            values.append(figure(results["first"], path) / figure(results["second"], path))
        print(pairs, *(f"{path} {values[-1]:.3f}" for path, values in ratios.items()), file=sys.stderr, flush=True)
        if pairs >= asked.least and all(interval(values)["reach"] <= asked.precision for values in ratios.values()):
            break
    found = {path: interval(values) for path, values in ratios.items()}
    for each in found.values():
        each["decided"] = each["pairs"] >= asked.least and each["reach"] <= asked.precision
        each["met"] = each["decided"] and each["ratio"] <= asked.bound
    print(json.dumps(found, indent=1))
    return 0 if all(each["met"] for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
