"""A W&B workspace for runs of `WandbSink`: latency, tail, syncs and memory over the trainer's steps."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import MissingExtraError
from ..profiling import semconv
from ..profiling.key_figures import log_key as key
from ..profiling.measurement import Instrument
from ..profiling.sinks.wandb import HISTOGRAM, STEP_METRIC
from .panels import STEP_PARTS

try:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
except ImportError as error:
    raise MissingExtraError("vgen dashboards --wandb", "W&B's workspaces", "dashboards") from error


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The workspace, not saved yet. This uses no network."""
    sections = [
        _section(
            "Time",
            _line("Where a step's time goes, s", *(_sum(part) for part in (semconv.STEP, *STEP_PARTS))),
            _line("Weight sync and pause, s", _sum(semconv.WEIGHT_SYNC), _sum(semconv.SYNC_PAUSE)),
            _line("Weight sync, bytes per second", key(semconv.SYNC_BANDWIDTH.name)),
        ),
        _section(
            "Rollouts",
            _line("Request, end to end, s", *_of(semconv.REQUEST_E2E, "p50", "p90", "p99", "max")),
            _line(
                "First token, each later one, queue: p99, s",
                *(_of(each, "p99")[0] for each in (semconv.REQUEST_TTFT, semconv.REQUEST_TPOT, semconv.REQUEST_QUEUE)),
            ),
            _line("Tokens per second", key(semconv.THROUGHPUT.name)),
            _line("Completion and prompt length, tokens", *_lengths()),
            _distributions("Requests by duration", semconv.REQUEST_E2E),
            _distributions("Completions by length", semconv.COMPLETION_LENGTH),
        ),
        _section(
            "Health",
            _line("Log-probabilities, engine against trainer, nats", *_of(semconv.DRIFT, "mean")),
            _line("Device memory in use, leaked, bytes", key(semconv.MEMORY_USED.name), key(semconv.LEAKED_TOTAL.name)),
            _line("Stalls, s; preemptions; telemetry lost", _sum(semconv.STALL), *_losses()),
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


def _lengths() -> list[str]:
    return [*_of(semconv.COMPLETION_LENGTH, "mean", "max"), *_of(semconv.PROMPT_LENGTH, "mean")]


def _losses() -> list[str]:
    return [key(semconv.REQUEST_PREEMPTED.name), key(semconv.DROPPED.name)]


def _of(histogram: Instrument, *parts: str) -> list[str]:
    return [f"{key(histogram.name)}.{part}" for part in parts]


def _sum(span: str) -> str:
    return _of(semconv.duration(span), "sum")[0]
