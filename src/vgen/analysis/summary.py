"""A run as one JSON object: what `vgen report --json` prints, and what the report in words is made of."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..profiling import names
from ..profiling.sketch import Histogram
from . import clocks, engine
from .phases import StepTime, step_times
from .recording import OPEN, SHOWN, Key, Recording, Slow
from .run import Process, deleted
from .tail import Curve, Tail, Tails, merged

BINS = 60
"""Into how many stretches a concurrency curve is cut."""
AT_ONCE = 1 << 16
"""How many values go into a sketch together: fewer would cost more each."""


def summarize(place: str | Path) -> dict[str, Any]:
    """Read a run and sum it up. Seconds and bytes; a number that is not known is absent or None, never 0.

    What could not be read or aligned is in `problems`, a sentence each. Raises nothing for what is in the files.
    """
    recording = Recording(place)
    problems = [*recording.problems, *deleted(place, recording.processes), *clocks.align(_witnesses(recording))]
    steps = step_times(recording)
    groups = _groups(steps)
    tails = Tails()
    told = [_step(recording, group, tails) for group in groups]
    unended = [row for row, end in enumerate(recording.end) if end == OPEN]
    if len(recording) and not steps:
        problems.append("no step was recorded: open steps with `profiling.step(n)` to see where their time goes")
    if unended:
        problems.append(f"{len(unended)} span{'s' * (len(unended) > 1)} never ended: {_listed(recording, unended)}")
    numbers = Counter(group[0].number for group in groups)
    again = sorted(number for number, times in numbers.items() if times > 1)
    if again:
        several = ", ".join(map(str, again[:5])) + (" and others" if len(again) > 5 else "")
        problems.append(f"recorded more than once, as when a run is started again in its directory: step {several}")
    if recording.lost:
        problems.append(f"{recording.lost} telemetry records were lost while the run was recorded")
    return {
        "run": str(place),
        "vgen": next((process.vgen for process in recording.processes if process.vgen), None),
        "spans": len(recording),
        "processes": [
            {
                "process": process.label,
                "host": process.host,
                "pid": process.pid,
                "rank": process.rank,
                "clock_shift_seconds": process.shift_ns / 1e9,
            }
            for process in recording.processes
        ],
        "steps": told,
        "total": _total(recording, groups, told, tails.tail()),
        "outside_steps": engine.outside(recording),
        "syncs": engine.syncs(recording),
        "memory": engine.cycles(recording),
        "stragglers": {"ranks": _ranks(groups), "servers": _servers(recording)},
        "slowest": [_slow(slow) for slow in recording.slowest],
        "errors": [
            {"span": span, "error": error, "count": number}
            for (span, error), number in recording.errors.most_common(20)
        ],
        "problems": problems,
    }


def _witnesses(recording: Recording) -> list[clocks.Witness]:
    """What each process's steps, and spans beneath another process's, say of its clock."""
    processes = recording.processes
    found = [clocks.Witness(process) for process in processes]
    if len({process.host for process in processes}) < 2:
        return found
    rows = {identity: row for row, identity in enumerate(recording.span_id)}
    step_name = recording.names.index(names.STEP) if names.STEP in recording.names else -1

    def times(row: int) -> tuple[int, int]:
        end = recording.end[row]
        return recording.start[row], processes[recording.process[row]].last_ns if end == OPEN else end

    for row, (name, parent, owner) in enumerate(
        zip(recording.name, recording.parent_id, recording.process, strict=True)
    ):
        if name == step_name:
            found[owner].steps[recording.step[row]] = times(row)
        above = rows.get(parent) if parent else None
        if above is not None and recording.process[above] != owner:
            found[owner].parents.append((processes[recording.process[above]], times(above), times(row)))
    return found


def _groups(steps: Sequence[StepTime]) -> list[list[StepTime]]:
    """The same step of several ranks together, the lowest rank first: of one number, and at one time."""
    groups: list[list[StepTime]] = []
    latest: dict[int, list[StepTime]] = {}
    for step in steps:
        group = latest.get(step.number)
        if group is not None and step.start < max(one.end for one in group) and not _has(group, step.process):
            group.append(step)
        else:
            latest[step.number] = [step]
            groups.append(latest[step.number])
    for group in groups:
        group.sort(key=lambda one: (one.process.rank is None, one.process.rank or 0))
    return groups


def _has(group: Sequence[StepTime], process: Process) -> bool:
    return any(step.process is process for step in group)


def _step(recording: Recording, group: Sequence[StepTime], whole: Tails) -> dict[str, Any]:
    """What is said of a step. Its tails are added to those of the `whole` run."""
    lead, keys = group[0], [step.key for step in group]
    counted = _counted(recording, keys)
    generated = sum(end - start for start, end in merged([call for step in group for call in step.calls()])) / 1e9
    tokens = counted.get(names.GENERATED_TOKENS.name)
    starts, ends = _timings(recording, keys)
    calls = [call for step in group for call in step.calls()]
    tails = Tails(starts, ends, calls)
    whole.add(tails)
    return {
        "step": lead.number,
        "process": lead.process.label,
        "seconds": lead.seconds,
        "ended": not lead.open,
        "error": lead.error,
        "phases": lead.phases,
        "trainer_seconds": lead.trainer,
        "after": lead.after,
        "input_tokens": counted.get(names.PROMPT_TOKENS.name),
        "output_tokens": tokens,
        "tokens_per_second": tokens / generated if tokens is not None and generated else None,
        "generate_calls": sum(step.generations for step in group),
        "requests": _requests(recording, keys),
        "tail": _tail(tails.tail()),
        "concurrency": _curve(starts, ends, calls),
        "slowest": [_slow(slow) for key in keys for slow in recording.slowest_of_step.get(key, ())],
        "ranks": [{"process": one.process.label, "seconds": one.seconds, "phases": one.phases} for one in group[1:]],
    }


def _total(
    recording: Recording, groups: Sequence[Sequence[StepTime]], told: Sequence[dict[str, Any]], tail: Tail | None
) -> dict[str, Any]:
    tokens = sum(step["output_tokens"] or 0 for step in told)
    generated = [step["output_tokens"] / step["tokens_per_second"] for step in told if step["tokens_per_second"]]
    first = min((step.start for group in groups for step in group), default=0)
    last = max((step.end for group in groups for step in group), default=0)
    return {
        "steps": len(told),
        "seconds": (last - first) / 1e9,
        "step_seconds": _spread(step["seconds"] for step in told),
        "phases": _sum(step["phases"] for step in told),
        "trainer_seconds": sum(step["trainer_seconds"] for step in told),
        "after": _sum(step["after"] for step in told),
        "output_tokens": tokens,
        "tokens_per_second": tokens / sum(generated) if generated else None,
        "requests": _all_requests(recording),
        "tail": _tail(tail),
    }


def _timings(recording: Recording, keys: Iterable[Key]) -> tuple[list[int], list[int]]:
    """When the requests of some steps ran, of all processes, on the run's clock."""
    starts: list[int] = []
    ends: list[int] = []
    for key in keys:
        for number, process in enumerate(recording.processes):
            found = recording.timings.get((key, number))
            if found is not None:
                starts += [start + process.shift_ns for start in found.starts]
                ends += [end + process.shift_ns for end in found.ends]
    return starts, ends


def _curve(starts: Sequence[int], ends: Sequence[int], calls: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    if not starts:
        return None
    curve = Curve(starts, ends)
    begin, end = min(min(starts), *(call[0] for call in calls)) if calls else min(starts), max(ends)
    running = [round(value, 3) for value in curve.bins(begin, end, BINS)]
    return {"seconds": (end - begin) / 1e9, "running": running, "peak": curve.peak()}


def _tail(found: Tail | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "sentence": found.sentence(),
        "long": found.long,
        "sequences": found.sequences,
        "last": found.last,
        "share": found.share,
        "seconds": found.seconds,
        "generation_seconds": found.generation_seconds,
        "running": found.running,
        "peak": found.peak,
        "mean": found.mean,
    }


def _counted(recording: Recording, keys: Iterable[Key]) -> dict[str, int]:
    return {k: int(v) for k, v in _sum(recording.counted.get(key, {}) for key in keys).items()}


def _requests(recording: Recording, keys: Sequence[Key]) -> dict[str, dict[str, float]]:
    """Percentiles of a step's requests, of all ranks: exact ones."""
    found: dict[str, dict[str, float]] = {}
    for name, called in SHOWN.items():
        values = sorted(value for key in keys for value in recording.values.get(key, {}).get(name, ()))
        if values:
            quantiles = {f"p{percent}": values[(len(values) - 1) * percent // 100] for percent in (50, 90, 99)}
            mean = math.fsum(values) / len(values)
            found[called] = {"count": len(values), "mean": mean, **quantiles, "max": values[-1]}
    return found


def _all_requests(recording: Recording) -> dict[str, dict[str, float]]:
    """Percentiles of the run's requests: of all their values, by sketches."""
    found: dict[str, dict[str, float]] = {}
    for name, called in SHOWN.items():
        histogram, waiting = Histogram(), array("d")
        for values in recording.values.values():
            waiting.extend(values.get(name, ()))
            if len(waiting) >= AT_ONCE:
                histogram.extend(waiting)
                waiting = array("d")
        histogram.extend(waiting)
        if histogram.count:
            found[called] = percentiles(histogram)
    return found


def percentiles(histogram: Histogram) -> dict[str, float]:
    """What is quoted of a distribution."""
    return {
        "count": histogram.count,
        "mean": histogram.total / histogram.count,
        "p50": histogram.quantile(0.5),
        "p90": histogram.quantile(0.9),
        "p99": histogram.quantile(0.99),
        "max": histogram.maximum,
    }


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    histogram = Histogram()
    histogram.extend(list(values))
    return percentiles(histogram) if histogram.count else None


def _sum(parts: Iterable[Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0) + value
    return found


def _slow(slow: Slow) -> dict[str, Any]:
    own = slow.attributes
    return {
        "seconds": slow.seconds,
        "step": own.get(names.STEP_NUMBER),
        "process": slow.process.label,
        "request": own.get(names.REQUEST_ID),
        "prompt": own.get(names.PROMPT_INDEX),
        "generation": own.get(names.GENERATION_INDEX),
        "server": own.get(names.SERVER),
        "input_tokens": own.get(names.INPUT_TOKENS),
        "output_tokens": own.get(names.OUTPUT_TOKENS),
        "queue": own.get(names.QUEUE_SECONDS),
        "time_to_first_token": own.get(names.TTFT_SECONDS),
        "time_per_output_token": own.get(names.TPOT_SECONDS),
        "preemptions": own.get(names.PREEMPTIONS),
        "finish_reason": own.get(names.FINISH_REASON),
    }


def _ranks(groups: Sequence[Sequence[StepTime]]) -> list[dict[str, Any]]:
    """For each rank, how much longer it took than the median of all, where there are several; the worst first.

    A straggler is one that keeps the others waiting: what counts is its own work, so the engine's phases and
    the caller's spans, each by itself.
    """
    excess: dict[str, dict[str, float]] = {}
    slowest: dict[str, int] = {}
    together = [group for group in groups if len(group) > 1]
    for group in together:
        phases = {name for step in group for name in step.phases}
        worst: dict[str, float] = {}
        for name in phases:
            middle = statistics.median(step.phases.get(name, 0.0) for step in group)
            for step in group:
                over = step.phases.get(name, 0.0) - middle
                own = excess.setdefault(step.process.label, {})
                own[name] = own.get(name, 0.0) + max(over, 0.0)
                worst[step.process.label] = max(worst.get(step.process.label, 0.0), over)
        label = max(worst, key=lambda one: worst[one])
        slowest[label] = slowest.get(label, 0) + 1
    found = [
        {
            "process": label,
            "steps": len(together),
            "slowest_in": slowest.get(label, 0),
            "phase": max(phases, key=lambda name: phases[name]),
            "seconds_over_median": max(phases.values()),
        }
        for label, phases in excess.items()
    ]
    return sorted(found, key=lambda one: -one["seconds_over_median"])


def _servers(recording: Recording) -> list[dict[str, Any]]:
    """For each server, its requests and how often it was the last to finish a step's; the slowest first."""
    seconds: dict[str, Histogram] = {}
    last: dict[str, int] = {}
    for timings in recording.timings.values():
        for server, (_, _, histogram) in timings.servers.items():
            seconds.setdefault(server, Histogram()).merge(histogram)
        if len(timings.servers) > 1:
            latest = max(timings.servers, key=lambda server: timings.servers[server][1])
            last[latest] = last.get(latest, 0) + 1
    found = [
        {"server": server, "last_in": last.get(server, 0), **percentiles(histogram)}
        for server, histogram in seconds.items()
        if histogram.count
    ]
    return sorted(found, key=lambda one: -one["p50"])


def _listed(recording: Recording, rows: Sequence[int]) -> str:
    shown = [recording.names[recording.name[row]] for row in rows]
    distinct = sorted(set(shown), key=shown.index)
    return ", ".join(distinct[:5]) + (" and others" if len(distinct) > 5 else "")
