"""The figures of a run as typed records. `vgen report --json` prints their fields under the same names.

Seconds and bytes. A figure that is not known is None, or missing from its dict, and never 0.
"""

from __future__ import annotations

import statistics
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from .tail import Tail


def median(values: Iterable[float | None]) -> float | None:
    """The median of those values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a report shows of many values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Concurrency:
    """How many sequences ran at once, over the generation of a step."""

    seconds: float
    running: list[float]
    """The mean of each of `figures.BINS` equal stretches of time."""
    peak: int


@dataclass(frozen=True, slots=True)
class RequestFigures:
    """One of the slowest requests."""

    seconds: float
    step: int | None
    process: str
    request: str | None
    """The engine's ID of it."""
    prompt: int | None
    """Which prompt of the call, from 0."""
    generation: int | None
    """Which completion of that prompt, from 0."""
    server: str | None
    input_tokens: int | None
    output_tokens: int | None
    queue: float | None
    time_to_first_token: float | None
    time_per_output_token: float | None
    preemptions: int | None
    finish_reason: Any


@dataclass(frozen=True, slots=True)
class RankFigures:
    """The same step on another rank."""

    process: str
    seconds: float
    phases: dict[str, float]


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One training step. Where several ranks did it, times are the lowest rank's and counts are those of all ranks."""

    step: int
    process: str
    seconds: float
    ended: bool
    error: str | None
    phases: dict[str, float]
    """Seconds by phase: the engine's, the caller's spans by name, and `rest`. They add up to `seconds`."""
    trainer_seconds: float
    """All that is not the engine's."""
    after: dict[str, float]
    """Seconds until the next step: the engine's phases, and `idle`."""
    input_tokens: int | None
    output_tokens: int | None
    tokens_per_second: float | None
    """While the engine generated."""
    generate_calls: int
    requests: dict[str, Distribution]
    """By name, as `recording.DISTRIBUTIONS` lists them: exact percentiles."""
    tail: Tail | None
    concurrency: Concurrency | None
    slowest: list[RequestFigures]
    ranks: list[RankFigures]
    """The other ranks."""


@dataclass(frozen=True, slots=True)
class TotalFigures:
    """All steps of the run together."""

    steps: int
    seconds: float
    """From the start of the first step to the end of the last."""
    step_seconds: Distribution | None
    phases: dict[str, float]
    trainer_seconds: float
    after: dict[str, float]
    output_tokens: int
    tokens_per_second: float | None
    requests: dict[str, Distribution]
    """Percentiles by sketches of all values: 0.5 % relative error."""
    tail: Tail | None


@dataclass(frozen=True, slots=True)
class ReceiverFigures:
    """How long the servers took for a phase of a sync."""

    median: float
    slowest: float


@dataclass(frozen=True, slots=True)
class SyncFigures:
    """One weight sync."""

    step: int | None
    process: str
    version: str | None
    transport: str | None
    seconds: float | None
    phases: dict[str, float]
    """Seconds by phase, and `rest`. They add up to `seconds`."""
    gather_seconds: float
    """Spent waiting for the trainer's model."""
    bytes: float | None
    gigabytes_per_second: float | None
    paused_seconds: float | None
    """How long nothing was generated."""
    receivers: dict[str, ReceiverFigures]
    """By phase, where there are several servers."""
    error: str | None


@dataclass(frozen=True, slots=True)
class SleepCycle:
    """A sleep with the wake-ups that followed it. Device memory is None on a CPU."""

    step: int | None
    process: str
    level: int | None
    sleep_seconds: float | None
    freed_bytes: float | None
    host_bytes_asleep: float | None
    device_free_bytes_asleep: float | None
    wake_seconds: float | None = None
    taken_bytes: float | None = None
    host_bytes_awake: float | None = None
    device_free_bytes_awake: float | None = None
    asleep_seconds: float | None = None
    """From the end of the sleep to the start of the first wake-up."""


@dataclass(frozen=True, slots=True)
class RankStraggler:
    """How much longer a rank took than the median of all ranks."""

    process: str
    steps: int
    """How many steps were compared."""
    slowest_in: int
    """In how many of them it was the slowest."""
    phase: str
    """The phase in which it lost most."""
    seconds_over_median: float
    """In that phase, over all steps."""


@dataclass(frozen=True, slots=True)
class ServerFigures(Distribution):
    """The requests of one server: the distribution of their seconds."""

    server: str
    last_in: int
    """In how many steps it was the last to finish."""


@dataclass(frozen=True, slots=True)
class Stragglers:
    """Who keeps the others waiting, the worst first."""

    ranks: list[RankStraggler]
    servers: list[ServerFigures]


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """How many spans of a name ended with a type of exception."""

    span: str
    error: str
    count: int


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """One process that wrote into the run."""

    process: str
    host: str
    pid: int | None
    rank: int | None
    clock_shift_seconds: float
    """What was added to its times."""


@dataclass(frozen=True, slots=True)
class RunFigures:
    """A whole run."""

    run: str
    vgen: str | None
    """The version that recorded it."""
    spans: int
    processes: list[ProcessFigures]
    steps: list[StepFigures]
    total: TotalFigures
    outside_steps: dict[str, float]
    """Seconds of the engine's phases that belong to no step."""
    syncs: list[SyncFigures]
    memory: list[SleepCycle]
    stragglers: Stragglers
    slowest: list[RequestFigures]
    errors: list[ErrorCount]
    problems: list[str]
    """What could not be read or aligned, one sentence each."""


def to_json(record: Any) -> dict[str, Any]:
    """A record's fields: its own, then those that it inherits. Records within it stay records.

    `json.dumps` converts those too, with this function as its `default`, and copies nothing.
    """
    own_fields = type(record).__annotations__
    ordered = sorted(fields(record), key=lambda field: field.name not in own_fields)
    return {field.name: getattr(record, field.name) for field in ordered}


def from_json(kind: Any, value: Any) -> Any:
    """The record of the type `kind` that was printed as the JSON `value`.

    Raises TypeError, AttributeError or ValueError where `value` is something else. Unknown keys are ignored.
    """
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = [one.name for one in fields(kind) if one.init and one.name in value]
        return typing.cast(Any, kind)(**{name: from_json(hints[name], value[name]) for name in known})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return [from_json(arguments[0], item) for item in value]
    if origin is dict:
        return {key: from_json(arguments[1], item) for key, item in value.items()}
    if origin is types.UnionType and value is not None:
        return from_json(arguments[0], value)
    return value
