"""One of each sink, with its real backend if it has one, for the tests of the sink contract."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from helpers import wandb_runs
from vgen.profiling import Sink
from vgen.profiling.sinks.jsonl import JsonlSink
from vgen.testing import MemorySink


def _otel(folder: Path) -> Sink:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from vgen.profiling.sinks.otel import OTelSink

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(InMemorySpanExporter()))
    return OTelSink(provider, MeterProvider([InMemoryMetricReader()]))


def _wandb(folder: Path) -> Sink:
    from vgen.profiling.sinks.wandb import WandbSink

    return WandbSink(wandb_runs.start(folder))


def _mlflow(folder: Path) -> Sink:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow would send its own telemetry to its makers
    from mlflow import MlflowClient

    from vgen.profiling.sinks.mlflow import MlflowSink

    # one database for the session, because making its tables takes seconds
    client = MlflowClient(f"sqlite:///{folder.parent / 'contract.db'}")
    known = client.get_experiment_by_name("contract")
    return MlflowSink(client, client.create_run(known.experiment_id if known else client.create_experiment("contract")))


def _trackio(folder: Path) -> Sink:
    os.environ.setdefault("TRACKIO_DIR", str(folder.parent / "trackio"))  # Trackio reads it once, when it is imported
    import trackio

    from vgen.profiling.sinks.trackio import TrackioSink

    return TrackioSink(trackio.init(project="contract", auto_log_cpu=False, auto_log_gpu=False))


def _nvtx(folder: Path) -> Sink:
    from vgen.profiling.sinks.nvtx import NvtxSink

    return NvtxSink()


def _torch_profiler(folder: Path) -> Sink:
    from vgen.profiling.sinks.torch_profiler import TorchProfilerSink

    return TorchProfilerSink()


SINKS: dict[str, Callable[[Path], Sink]] = {
    "memory": lambda folder: MemorySink(),
    "jsonl": lambda folder: JsonlSink(folder),
    "otel": _otel,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "nvtx": _nvtx,
    "torch_profiler": _torch_profiler,
}
