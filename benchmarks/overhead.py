"""The cost of telemetry for the thread that records it, compared with other tools.

    python benchmarks/overhead.py                          # a page of tables
    python benchmarks/overhead.py --json                   # one JSON object
    python benchmarks/overhead.py --from result.json       # the page of an earlier result: docs/overhead.md

A span is an empty block with three attributes. The cases that write JSON lines run long enough to include the worker
thread, which shares the interpreter lock. Each round runs every case once, so that a machine that slows down slows all
cases. The page has the median, the minimum and the maximum of `ROUNDS` rounds; a ratio is the median of the ratios
within a round.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

from vgen.profiling import ProfilingContext, semconv
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.profiling.sinks.memory import MemorySink
from vgen.profiling.sinks.otel import OTelSink
from vgen.profiling.sinks.wandb import WandbSink

ROUNDS, FAULT_ROUNDS = 7, 3
REQUESTS, STEP_SECONDS = 10_000, 30.0
DEADLINE, PACED_SECONDS = 2.0, 5.0
FAULTS = {
    "otlp": {"refuses": "refuses connections", "hangs": "accepts connections but never answers"},
    "wandb": {"frozen": "frozen: its service is stopped with SIGSTOP", "killed": "killed: its service is killed"},
}


def microseconds(run: Callable[[int], None], count: int) -> float:
    """The mean microseconds of one span, from a loop of `count`."""
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


def span_costs(folder: Path) -> dict[str, list[float]]:
    """Microseconds of one span in each round, by case."""
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
    return found


def ratio(of: list[float], to: list[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(one / other for one, other in zip(of, to, strict=True))


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
        semconv.REQUEST_START, semconv.REQUEST_E2E, semconv.REQUEST_QUEUE, semconv.REQUEST_PREFILL,
        semconv.REQUEST_TTFT, semconv.REQUEST_TPOT, semconv.COMPLETION_LENGTH,
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
    blocks: list[int] = []
    resident: list[int] = []
    for number in range(200):
        with small.step(number):
            small.record_many(semconv.REQUEST_E2E, values)
            with small.span("x"):
                pass
        if number % 50 == 49:
            small.flush(10.0)
            gc.collect()
            blocks.append(sys.getallocatedblocks())
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    for profiling in (usual, metered, small):
        profiling.close()
    run.finish()
    return {
        "requests": REQUESTS,
        "step_seconds": STEP_SECONDS,
        "cpu_seconds": {name: spread(found) for name, found in seconds.items()},
        "share_of_step": {name: statistics.median(found) / STEP_SECONDS for name, found in seconds.items()},
        "blocks_after_50_100_150_200_steps": blocks,
        "resident_bytes_after_50_100_150_200_steps": resident,
    }


@contextlib.contextmanager
def collector(fault: str) -> Iterator[str]:
    """An OTLP/HTTP endpoint that answers, or one that has the fault."""
    if fault:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            if fault == "refuses":
                silent.close()
            yield f"http://127.0.0.1:{port}"
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
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def paced(profiling: ProfilingContext, seconds: float = PACED_SECONDS) -> list[float]:
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


def faulty(kind: str, fault: str) -> dict[str, float]:
    """p50 and p99 of a span and the seconds of the ends, beside a backend with that fault, in its own process."""
    command = [sys.executable, __file__, "--kind", kind, "--fault", fault]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind}, {fault or 'well'}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def in_faulty_process(kind: str, fault: str) -> None:
    # W&B's service writes on while the folder is removed
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        ends: dict[str, Callable[[], object]] = {}
        if kind == "otlp":
            from vgen.profiling.sinks.otel_sdk import otlp_providers

            os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = url = stack.enter_context(collector(fault))
            otlp = otlp_providers()
            profiling = ProfilingContext([OTelSink(otlp.tracer_provider, otlp.meter_provider)])
            ends["providers_close_seconds"] = lambda: otlp.close(DEADLINE)
            if fault:
                ends["sdk_shutdown_seconds"] = bare_sdk(url + "/v1/traces").shutdown
        else:
            import psutil
            import wandb

            run = wandb.init(project="fault", dir=folder, settings=wandb.Settings(silent=True))
            profiling = ProfilingContext([WandbSink(run)])
            for process in psutil.Process().children(recursive=True) if fault else ():
                process.send_signal(signal.SIGSTOP if fault == "frozen" else signal.SIGKILL)
                stack.callback(process.kill)
        found = sorted(paced(profiling))
        result = {"p50": found[len(found) // 2], "p99": found[len(found) * 99 // 100]}
        for name, end in {"close_seconds": lambda: profiling.close(DEADLINE), **ends}.items():
            start = time.perf_counter()
            end()
            result[name] = time.perf_counter() - start
        print(json.dumps(result), flush=True)
    os._exit(0)  # W&B's own exit would wait for the service that was stopped


def bare_sdk(url: str) -> Any:
    """What one would have without vgen, with a span to deliver."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    made = provider(OTLPSpanExporter(endpoint=url))
    made.get_tracer("bare").start_span("x").end()
    return made


def faults() -> dict[str, dict[str, float]]:
    """By backend and fault, medians of the rounds; `p99_ratio` is to the healthy one of the same round."""
    cases = [(kind, fault) for kind, known in FAULTS.items() for fault in ("", *known)]
    rounds = [{case: faulty(*case) for case in cases} for _ in range(FAULT_ROUNDS)]
    result: dict[str, dict[str, float]] = {}
    for kind, fault in cases:
        found = [each[kind, fault] for each in rounds]
        made = {name: statistics.median(each[name] for each in found) for name in found[0]}
        made["p99_ratio"] = ratio([each["p99"] for each in found], [each[kind, ""]["p99"] for each in rounds])
        made |= {f"longest_{name}": max(each[name] for each in found) for name in made if "close" in name}
        result[f"{kind}, {fault or 'well'}"] = made
    return result


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("opentelemetry-sdk", "wandb", "trl", "ddsketch")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gigabytes": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: version(package) for package in packages},
    }


def measure() -> dict[str, Any]:
    host = machine()
    with tempfile.TemporaryDirectory() as folder:
        costs = span_costs(Path(folder))
        requests = request_costs(Path(folder))
    otel = "OpenTelemetry SDK, batch processor"
    return {
        "machine": host,
        "span_microseconds": {name: spread(values) for name, values in costs.items()},
        "otel_ratio": ratio(costs[f"vgen, {otel}"], costs[otel]),
        "requests": requests,
        "faults": faults(),
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
        "These commands make this page; no figure is typed by hand: "
        "`python benchmarks/overhead.py --json > docs/results/overhead.json` and "
        "`python benchmarks/overhead.py --from docs/results/overhead.json > docs/overhead.md`.",
        "",
        f"Measured on {host['cores']} cores of {host['cpu']} with {host['gigabytes']} GiB, {host['system']}, "
        f"with a load average of {host['load']:.1f} before the start. Python {host['python']}, "
        f"OpenTelemetry SDK {host['opentelemetry-sdk']}, W&B {host['wandb']}, TRL {host['trl']}.",
        "",
        "## One span with three attributes: time on the thread that opens it",
        "",
        "| | median µs | min | max | budget |",
        "|---|---:|---:|---:|---|",
    ]
    for name, found in result["span_microseconds"].items():
        figures = " | ".join(f"{found[key]:.2f}" for key in ("median", "min", "max"))
        lines.append(f"| {name} | {figures} | {BUDGET.get(name, '')} |")
    lines += [
        "",
        f"With the OpenTelemetry SDK, a span of vgen takes {result['otel_ratio']:.2f} times as long as the SDK's own.",
        "",
        f"## {result['requests']['requests']:,} requests in a step of {result['requests']['step_seconds']:.0f} s",
        "",
        "CPU seconds of the whole process, including worker threads.",
        "",
        "| | median s | share of the step | budget |",
        "|---|---:|---:|---|",
    ]
    for (name, share), budget in zip(result["requests"]["share_of_step"].items(), ("≤ 1 %", "≤ 3 %"), strict=True):
        seconds = result["requests"]["cpu_seconds"][name]["median"]
        lines.append(f"| {name} | {seconds:.3f} | {share:.2%} | {budget} |")
    of_requests = result["requests"]
    series = [of_requests[f"{name}_after_50_100_150_200_steps"] for name in ("blocks", "resident_bytes")]
    flat = all(values[-1] <= 1.01 * values[0] for values in series)
    blocks = ", ".join(f"{count:,}" for count in of_requests["blocks_after_50_100_150_200_steps"])
    resident = ", ".join(f"{size / 1e6:.0f}" for size in of_requests["resident_bytes_after_50_100_150_200_steps"])
    shutdowns = [f["sdk_shutdown_seconds"] for f in result["faults"].values() if "sdk_shutdown_seconds" in f]
    lines += [
        "",
        f"{'Memory did not grow' if flat else 'Memory grew'}: after 50, 100, 150 and 200 steps of {REQUESTS:,} "
        f"requests each, with JSONL, summary and W&B, Python had allocated {blocks} memory blocks, and the whole "
        f"process had {resident} MB of resident memory.",
        "",
        "## With a backend that is dead or frozen",
        "",
        f"One span per millisecond for {PACED_SECONDS:.0f} seconds, which is enough to fill the OpenTelemetry SDK's "
        f"span queue (2,048 spans). Then `close({DEADLINE:g})` of the context and of the providers. The table has "
        f"medians of {FAULT_ROUNDS} rounds, and the longest `close`. The ratio to the healthy p99 is the median of "
        f"the ratios within each round. Budget: p99 ≤ 2 × that of a healthy backend, each `close` ≤ "
        f"{DEADLINE + 0.2:.1f} s.",
        "",
        "| | p50 µs of one span | p99 µs of one span | × healthy p99 | context `close` s | providers `close` s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in result["faults"].items():
        kind, _, fault = name.partition(", ")
        shown = f"{kind}, {FAULTS[kind].get(fault, 'healthy')}"
        providers = f"{found['longest_providers_close_seconds']:.2f}" if kind == "otlp" else ""
        lines.append(
            f"| {shown} | {found['p50']:.1f} | {found['p99']:.1f} | {found['p99_ratio']:.2f} "
            f"| {found['longest_close_seconds']:.2f} | {providers} |"
        )
    took = " and ".join(f"{seconds:.1f} s" for seconds in shutdowns)
    lines += ["", f"The SDK's own `shutdown()` of a provider with one span took {took} with the same collectors."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--from",
        dest="result",
        type=Path,
        metavar="FILE",
        help="show the result that --json printed, and measure nothing",
    )
    parser.add_argument("--kind", choices=FAULTS, help=argparse.SUPPRESS)
    parser.add_argument("--fault", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        in_faulty_process(options.kind, options.fault)
        return
    if options.result is not None:
        print(page(json.loads(options.result.read_text())), end="")
        return
    with contextlib.redirect_stdout(sys.stderr):  # libraries print to standard output, which is for the result
        result = measure()
    print(json.dumps(result, indent=1) if options.json else page(result), end="\n" if options.json else "")


if __name__ == "__main__":
    main()
