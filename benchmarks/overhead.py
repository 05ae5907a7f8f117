"""What telemetry costs the thread that does the work, side by side with what one would use instead.

    python benchmarks/overhead.py            # a table
    python benchmarks/overhead.py --json     # one JSON object
    python benchmarks/overhead.py --markdown # the page docs/overhead.md

A span is an empty block with three attributes. JSON lines run long enough for the worker thread, which shares the
interpreter lock, to be at work meanwhile. Every case runs `ROUNDS` times, the cases in turn, so that a machine
that slows down slows all of them; quoted are the median of the rounds and their extremes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import http.server
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

from vgen.profiling import ProfilingContext, names
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.profiling.sinks.memory import MemorySink
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.wandb import WandbSink

ROUNDS = 7
REQUESTS, STEP_SECONDS = 10_000, 30.0
DEADLINE = 2.0


def microseconds(run: Callable[[int], None], count: int) -> float:
    """Of one span, from `count` of them."""
    gc.collect()
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count * 1e6


def spans(profiling: ProfilingContext) -> Callable[[int], None]:
    def run(count: int) -> None:
        span = profiling.span
        for _ in range(count):
            with span("benchmark", prompts=8, weight=0.5, version="step-1"):
                pass

    return run


def nullcontexts(count: int) -> None:
    for _ in range(count):
        with contextlib.nullcontext():
            pass


def clock_pairs(count: int) -> None:
    total = 0.0
    for _ in range(count):
        start = time.perf_counter()
        total += time.perf_counter() - start


def tracer_spans(tracer: Any) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            attributes = {"prompts": 8, "weight": 0.5, "version": "step-1"}
            with tracer.start_as_current_span("benchmark", attributes=attributes):
                pass

    return run


def trl_spans(count: int) -> None:
    from trl.extras.profiling import ProfilingContext as TRLProfilingContext

    for _ in range(count):
        with TRLProfilingContext(name="benchmark", report_to=["wandb"]):
            pass


def provider(exporter: Any) -> Any:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    made = TracerProvider()
    # a queue that holds a whole round: what is measured is the caller's cost, not whose queue is longer
    made.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=1 << 16))
    return made


def null_exporter() -> Any:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            pass

    return Nowhere()


def span_costs(folder: Path) -> dict[str, dict[str, float]]:
    """Microseconds of one span, by case."""
    import wandb
    from opentelemetry import trace

    run = wandb.init(project="overhead", dir=str(folder), settings=wandb.Settings(silent=True))
    open_contexts: list[ProfilingContext] = []

    def context(*sinks: Any) -> Callable[[int], None]:
        open_contexts.append(ProfilingContext(sinks))
        return spans(open_contexts[-1])

    tracer = provider(null_exporter()).get_tracer("benchmark")
    cases: dict[str, tuple[Callable[[int], None], int]] = {
        "contextlib.nullcontext": (nullcontexts, 100_000),
        "perf_counter pair": (clock_pairs, 100_000),
        "vgen disabled": (spans(ProfilingContext.disabled()), 100_000),
        "vgen, no sink": (context(), 20_000),
        "vgen, memory": (context(MemorySink()), 20_000),
        "vgen, JSONL": (context(JsonlSink(folder / "jsonl")), 30_000),
        "OpenTelemetry API, no SDK": (tracer_spans(trace.NoOpTracerProvider().get_tracer("benchmark")), 20_000),
        "OpenTelemetry SDK, batch processor": (tracer_spans(tracer), 5_000),
        "vgen, OpenTelemetry SDK, batch processor": (context(OTelSink(provider(null_exporter()))), 5_000),
        "vgen, W&B": (context(WandbSink(run)), 20_000),
        "TRL 1.16 ProfilingContext, W&B": (trl_spans, 300),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, (case, count) in cases.items():
            found[name].append(microseconds(case, count))
            time.sleep(0.1)  # queues run empty: a case does not pay for the one before it
    for profiling in open_contexts:
        profiling.close()
    run.finish()
    return {name: spread(values) for name, values in found.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def request_costs(folder: Path) -> dict[str, Any]:
    """Seconds that recording `REQUESTS` requests takes in a step, on the caller's thread and in all."""
    import wandb
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    run = wandb.init(project="requests", dir=str(folder), settings=wandb.Settings(silent=True))
    values = [0.1 + 0.0001 * i for i in range(REQUESTS)]
    instruments = (
        names.REQUEST_START, names.REQUEST_E2E, names.REQUEST_QUEUE, names.REQUEST_PREFILL, names.REQUEST_TTFT,
        names.REQUEST_TPOT, names.COMPLETION_LENGTH,
    )  # fmt: skip

    def step(profiling: ProfilingContext, number: int) -> float:
        """CPU seconds of the whole process: what a worker thread burns is taken from the training loop too."""
        start = time.process_time()
        with profiling.step(number) as row:
            for instrument in instruments:
                profiling.record_many(instrument, values)
        row.summary()
        profiling.flush(10.0)
        return time.process_time() - start

    usual = ProfilingContext([JsonlSink(folder / "requests"), WandbSink(run)])
    meters = MeterProvider([InMemoryMetricReader()])
    metered = ProfilingContext([JsonlSink(folder / "metered"), WandbSink(run), OTelSink(None, meters)])
    seconds = {"JSONL, summary, W&B": [], "the same and OpenTelemetry histograms": []}
    for number in range(ROUNDS):
        seconds["JSONL, summary, W&B"].append(step(usual, number))
        seconds["the same and OpenTelemetry histograms"].append(step(metered, number))
    small = ProfilingContext([JsonlSink(folder / "flat", max_bytes=1 << 20, max_parts=2), WandbSink(run)])
    sizes: list[int] = []
    tracemalloc.start()
    for number in range(200):
        with small.step(number):
            small.record_many(names.REQUEST_E2E, values[:1000])
            with small.span("x"):
                pass
        if number % 50 == 49:
            small.flush(10.0)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    for profiling in (usual, metered, small):
        profiling.close()
    run.finish()
    return {
        "requests": REQUESTS,
        "step_seconds": STEP_SECONDS,
        "cpu_seconds": {name: spread(found) for name, found in seconds.items()},
        "share_of_step": {name: statistics.median(found) / STEP_SECONDS for name, found in seconds.items()},
        "traced_bytes_after_50_100_150_200_steps": sizes,
    }


@contextlib.contextmanager
def collector(answers: bool) -> Iterator[str]:
    """An OTLP/HTTP endpoint that answers, or one that takes connections and never says a word."""
    if not answers:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        return

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    server.shutdown()


def paced(profiling: ProfilingContext, seconds: float = 8.0) -> list[float]:
    """Microseconds of each of many spans, one every millisecond, as a loop under load would open them."""
    found: list[float] = []
    until = time.perf_counter() + seconds
    step = 0
    while time.perf_counter() < until:
        with profiling.step(step):
            for _ in range(100):
                start = time.perf_counter()
                with profiling.span("benchmark", prompts=8, weight=0.5, version="step-1"):
                    pass
                found.append((time.perf_counter() - start) * 1e6)
                time.sleep(0.001)
        step += 1
    return found


def faulty(kind: str, broken: bool) -> dict[str, float]:
    """p50 and p99 of a span and the seconds of `close()`, beside a backend that is well or not; in its own process."""
    command = [sys.executable, __file__, "--fault", kind, *(["--broken"] if broken else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def fault(kind: str, broken: bool) -> dict[str, float]:
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        stopped: list[int] = []
        if kind == "otlp":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            url = stack.enter_context(collector(answers=not broken))
            profiling = ProfilingContext([OTelSink(provider(OTLPSpanExporter(endpoint=url)))])
        else:
            import psutil
            import wandb

            run = wandb.init(project="fault", dir=folder, settings=wandb.Settings(silent=True))
            profiling = ProfilingContext([WandbSink(run)])
            stopped = [child.pid for child in psutil.Process().children(recursive=True)] if broken else []
            for process in stopped:
                os.kill(process, signal.SIGSTOP)
        found = sorted(paced(profiling))
        start = time.perf_counter()
        profiling.close(DEADLINE)
        closed = time.perf_counter() - start
        result = {"p50": found[len(found) // 2], "p99": found[len(found) * 99 // 100], "close_seconds": closed}
        print(json.dumps(result), flush=True)
        for process in stopped:
            os.kill(process, signal.SIGKILL)
        os._exit(0)  # W&B's own exit would wait for the service that was stopped


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("opentelemetry-sdk", "wandb", "trl", "ddsketch")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: version(package) for package in packages},
    }


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        costs = span_costs(Path(folder))
        requests = request_costs(Path(folder))
    faults = {
        f"{kind}, {'broken' if broken else 'well'}": faulty(kind, broken)
        for kind in ("otlp", "wandb")
        for broken in (False, True)
    }
    sdk = costs["OpenTelemetry SDK, batch processor"]["median"]
    return {
        "machine": machine(),
        "span_microseconds": costs,
        "otel_ratio": costs["vgen, OpenTelemetry SDK, batch processor"]["median"] / sdk,
        "requests": requests,
        "faults": faults,
    }


BUDGET = {
    "vgen disabled": "≤ 0.5",
    "vgen, no sink": "≤ 3",
    "vgen, memory": "≤ 4",
    "vgen, JSONL": "≤ 8",
    "vgen, OpenTelemetry SDK, batch processor": "≤ 1.2 × the SDK alone",
    "vgen, W&B": "≤ 10",
}


def page(result: dict[str, Any]) -> str:
    host = result["machine"]
    lines = [
        "# What telemetry costs",
        "",
        "Made by `python benchmarks/overhead.py --markdown > docs/overhead.md`; nothing here was typed in. "
        f"Measured on {host['cores']} cores of {host['cpu']}, Python {host['python']}, "
        f"OpenTelemetry SDK {host['opentelemetry-sdk']}, W&B {host['wandb']}, TRL {host['trl']}.",
        "",
        "## One span with three attributes, on the thread that opens it",
        "",
        "| | median µs | min | max | budget |",
        "|---|---:|---:|---:|---|",
    ]
    for name, found in result["span_microseconds"].items():
        figures = " | ".join(f"{found[key]:.2f}" for key in ("median", "min", "max"))
        lines.append(f"| {name} | {figures} | {BUDGET.get(name, '')} |")
    lines += [
        "",
        f"With the OpenTelemetry SDK a vgen span costs {result['otel_ratio']:.2f} times what the SDK's own costs.",
        "",
        f"## {result['requests']['requests']:,} requests in a step of {result['requests']['step_seconds']:.0f} s",
        "",
        "CPU seconds of the whole process, worker threads included.",
        "",
        "| | median s | share of the step | budget |",
        "|---|---:|---:|---|",
    ]
    for (name, share), budget in zip(result["requests"]["share_of_step"].items(), ("≤ 1 %", "≤ 3 %"), strict=True):
        seconds = result["requests"]["cpu_seconds"][name]["median"]
        lines.append(f"| {name} | {seconds:.3f} | {share:.2%} | {budget} |")
    sizes = ", ".join(f"{size / 1e6:.2f}" for size in result["requests"]["traced_bytes_after_50_100_150_200_steps"])
    lines += [
        "",
        f"Python memory after 50, 100, 150 and 200 steps of 1,000 requests: {sizes} MB.",
        "",
        "## Beside a backend that is dead or frozen",
        "",
        f"A span each millisecond for eight seconds; `close({DEADLINE:g})` at the end. Broken OTLP: a collector that "
        "accepts and never answers. Broken W&B: its service stopped with SIGSTOP.",
        "",
        "| | p50 µs | p99 µs | close() s |",
        "|---|---:|---:|---:|",
    ]
    for name, found in result["faults"].items():
        lines.append(f"| {name} | {found['p50']:.1f} | {found['p99']:.1f} | {found['close_seconds']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--fault", choices=("otlp", "wandb"), help=argparse.SUPPRESS)
    parser.add_argument("--broken", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fault:
        fault(options.fault, options.broken)
        return
    with contextlib.redirect_stdout(sys.stderr):  # libraries have their say there
        result = measure()
    print(json.dumps(result, indent=2) if options.json else page(result), end="\n" if options.json else "")


if __name__ == "__main__":
    main()
