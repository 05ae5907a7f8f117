"""A W&B workspace for runs of `WandbSink`: latency, tail, syncs and memory over the trainer's steps."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import MissingExtraError
from ..profiling import semconv
from ..profiling.measurement import Instrument
from ..profiling.sinks.wandb import HISTOGRAM, STEP_METRIC, key
from .panels import REQUEST_PHASES, STEP_PARTS, SYNC_PHASES

try:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
except ImportError as error:
    raise MissingExtraError("vgen dashboards --wandb", "W&B's workspaces", "dashboards") from error


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The workspace, not saved yet. This uses no network."""
    sections = [
        _section(
            "Rollout latency",
            _line("Generate call", *_of(semconv.duration(semconv.GENERATE), "p50", "p90", "max")),
            _line("Request, end to end", *_of(semconv.REQUEST_E2E, "p50", "p90", "p99")),
            _line("Time to first token", *_of(semconv.REQUEST_TTFT, "p50", "p90", "p99")),
            _line("Time per output token", *_of(semconv.REQUEST_TPOT, "p50", "p90", "p99")),
            _line("Where a request's time goes", *(_of(phase, "p50")[0] for phase in REQUEST_PHASES)),
            _line("Tokens per second", key(semconv.THROUGHPUT.name)),
        ),
        _section(
            "Tail",
            _line("Slowest request and median", *_of(semconv.REQUEST_E2E, "max", "p50")),
            _line("Longest completion and median", *_of(semconv.COMPLETION_LENGTH, "max", "p50")),
            _distributions("Requests by duration", semconv.REQUEST_E2E),
            _distributions("Completions by length", semconv.COMPLETION_LENGTH),
        ),
        _section(
            "Weight sync",
            _line("Weight sync", *_of(semconv.duration(semconv.WEIGHT_SYNC), "p50", "max")),
            _line("Seconds of its phases", *(_sum(phase) for phase in SYNC_PHASES)),
            _line("Bytes per second", key(semconv.SYNC_BANDWIDTH.name)),
            _line("Bytes", key(semconv.SYNCED_BYTES.name)),
        ),
        _section(
            "Sleep and memory",
            _line("Sleep and wake up", _sum(semconv.SLEEP), _sum(semconv.WAKE_UP)),
            _line("Device memory, freed and allocated", key(semconv.SLEEP_FREED.name), key(semconv.WAKE_TAKEN.name)),
            _line("Memory in use", key(semconv.MEMORY_USED.name), key(semconv.MEMORY_RESIDENT.name)),
            _line("Leaked", key(semconv.LEAKED_TOTAL.name)),
        ),
        _section(
            "Steps",
            _line("Where a step's time goes", _sum(semconv.STEP), *(_sum(part) for part in STEP_PARTS)),
            _line("Seconds of stalls", _sum(semconv.STALL)),
            _line("Telemetry lost", key(semconv.DROPPED.name)),
        ),
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="vgen",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP_METRIC),
    )


def save(target: str) -> int:
    """Save it as a new workspace of `ENTITY/PROJECT`. Returns the exit status."""
    entity, _, project = target.partition("/")
    if not entity or not project or "/" in project:
        print(f"vgen dashboards: --wandb takes ENTITY/PROJECT, got {target}", file=sys.stderr)
        return 2
    made = workspace(entity, project)
    try:
        made.save_as_new_view()
    except Exception as error:
        problem = f"{type(error).__name__} (is WANDB_API_KEY set, or `wandb login` done, and is {target} yours?)"
        print(f"vgen dashboards: W&B did not take the workspace: {problem}", file=sys.stderr)
        return 1
    print(made.url)
    return 0


def _section(name: str, *panels: Any) -> workspaces.Section:
    return workspaces.Section(name=name, panels=list(panels), is_open=True)


def _line(title: str, *shown: str) -> reports.LinePlot:
    return reports.LinePlot(title=title, x=STEP_METRIC, y=list(shown))


def _distributions(title: str, instrument: Instrument) -> reports.MediaBrowser:
    return reports.MediaBrowser(title=title, media_keys=[key(instrument.name) + HISTOGRAM])


def _of(histogram: Instrument, *parts: str) -> list[str]:
    return [f"{key(histogram.name)}.{part}" for part in parts]


def _sum(span: str) -> str:
    return _of(semconv.duration(span), "sum")[0]
