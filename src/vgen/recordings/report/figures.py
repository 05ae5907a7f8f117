"""A run summed up: from its recording to the figures that `vgen report` shows."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...profiling import semconv
from ...profiling.aggregation import Histogram
from ..reader import clocks, untrusted
from ..reader.processes import deleted
from ..reader.recording import DISTRIBUTIONS, OPEN, Recording
from ..reader.requests import Key, SlowRequest
from . import engine_activity
from .figure_types import (
    Concurrency,
    Distribution,
    ErrorCount,
    ProcessFigures,
    RankFigures,
    RankStraggler,
    RequestFigures,
    RunFigures,
    ServerFigures,
    StepFigures,
    Stragglers,
    TotalFigures,
    to_json,
)
from .phases import StepTimes, add_up, step_times
from .tail import Curve, Tail, Tails, merged

BINS = 60
"""Into how many stretches of time a concurrency curve is cut."""
AT_ONCE = 1 << 16
"""How many values are added to a sketch together. Fewer at once would take longer."""
MOST_ERRORS = 20
"""How many kinds of errors are shown, the most frequent first."""

_REQUEST_ATTRIBUTES = {
    "step": semconv.STEP_NUMBER,
    "request": semconv.REQUEST_ID,
    "prompt": semconv.PROMPT_INDEX,
    "generation": semconv.GENERATION_INDEX,
    "server": semconv.SERVER,
    "input_tokens": semconv.INPUT_TOKENS,
    "output_tokens": semconv.OUTPUT_TOKENS,
    "queue": semconv.QUEUE_SECONDS,
    "time_to_first_token": semconv.TTFT_SECONDS,
    "time_per_output_token": semconv.TPOT_SECONDS,
    "preemptions": semconv.PREEMPTIONS,
    "finish_reason": semconv.FINISH_REASON,
}
_REQUEST_TEXTS = ("request", "server")


def summarize(place: str | Path) -> RunFigures:
    """Read a run and sum it up. Whatever the files hold, it raises nothing: what could not be read is in `problems`."""
    recording = Recording(place)
    problems = [*recording.problems, *deleted(place, recording.processes)]
    problems += clocks.align(recording.processes, _observations(recording))
    steps = step_times(recording)
    groups = _groups(steps)
    tails = Tails()
    step_figures = [_step(recording, group, tails) for group in groups]
    return RunFigures(
        run=untrusted.text(str(place)),
        vgen=next((process.vgen for process in recording.processes if process.vgen), None),
        spans=len(recording),
        processes=[
            ProcessFigures(process.label, process.host, process.pid, process.rank, process.shift_ns / 1e9)
            for process in recording.processes
        ],
        steps=step_figures,
        total=_total(recording, steps, step_figures, tails.tail()),
        outside_steps=engine_activity.outside_steps(recording),
        syncs=engine_activity.syncs(recording),
        memory=engine_activity.sleep_cycles(recording),
        stragglers=Stragglers(_ranks(groups), _servers(recording)),
        slowest=[_request(slow) for slow in recording.requests.slowest()],
        errors=[ErrorCount(*kind, count) for kind, count in recording.errors.most_common(MOST_ERRORS)],
        problems=[*problems, *_problems(recording, groups)],
    )


def _problems(recording: Recording, groups: Sequence[Sequence[StepTimes]]) -> Iterator[str]:
    """What the reader of a report must know about the run."""
    if len(recording) and not groups:
        yield "no step was recorded: open steps with `profiling.step(n)` to see where their time goes"
    unended = [recording.span_name(row) for row, end in enumerate(recording.end) if end == OPEN]
    if unended:
        yield f"{len(unended)} span{'s' * (len(unended) > 1)} never ended: {_first(dict.fromkeys(unended))}"
    numbers = Counter(group[0].number for group in groups)
    again = sorted(number for number, times in numbers.items() if times > 1)
    if again:
        yield f"recorded more than once, as when a run is started again in its directory: step {_first(again)}"
    if recording.lost:
        yield f"{recording.lost} telemetry records were lost while the run was recorded"


def _first(values: Iterable[Any], most: int = 5) -> str:
    """The first values, and whether there are others."""
    texts = list(map(str, values))
    return ", ".join(texts[:most]) + (" and others" if len(texts) > most else "")


def _observations(recording: Recording) -> Iterator[clocks.Observation]:
    """What the steps, and the spans with a parent in another process, say about the clocks."""
    processes = recording.processes
    rows = {span_id: row for row, span_id in enumerate(recording.span_id)}

    def times(row: int) -> clocks.Times:
        end = recording.end[row]
        return recording.start[row], processes[recording.process[row]].last_ns if end == OPEN else end

    for row, (parent, owner) in enumerate(zip(recording.parent_id, recording.process, strict=True)):
        step = recording.step[row] if recording.span_name(row) == semconv.STEP else None
        above = rows.get(parent) if parent else None
        if above is not None and recording.process[above] != owner:
            outer = processes[recording.process[above]], times(above)
            yield clocks.Observation(processes[owner], times(row), step, outer)
        elif step is not None:
            yield clocks.Observation(processes[owner], times(row), step)


def _groups(steps: Sequence[StepTimes]) -> list[list[StepTimes]]:
    """The same step of several ranks together, the lowest rank first: steps of one number at one time."""
    groups: list[list[StepTimes]] = []
    latest: dict[int, list[StepTimes]] = {}
    for step in steps:
        group = latest.get(step.number, [])
        overlaps = step.start < max((other.end for other in group), default=step.start)
        if overlaps and all(other.process is not step.process for other in group):
            group.append(step)
        else:
            latest[step.number] = [step]
            groups.append(latest[step.number])
    for group in groups:
        group.sort(key=lambda step: (step.process.rank is None, step.process.rank or 0))
    return groups


def _step(recording: Recording, group: Sequence[StepTimes], total: Tails) -> StepFigures:
    """The figures of one step on all ranks. Adds its tails to `total`."""
    lead, keys = group[0], [step.key for step in group]
    counters = Counter[str]()
    for key in keys:
        counters.update(recording.counters.get(key, {}))
    tokens = counters.get(semconv.GENERATED_TOKENS.name)
    calls = [call for step in group for call in step.generating()]
    seconds = sum(end - start for start, end in merged(calls)) / 1e9
    starts, ends = _request_times(recording, keys)
    tails = Tails(starts, ends, calls)
    total.add(tails)
    return StepFigures(
        step=lead.number,
        process=lead.process.label,
        seconds=lead.seconds,
        ended=not lead.open,
        error=lead.error,
        phases=lead.phases,
        trainer_seconds=lead.trainer_seconds,
        after=lead.after,
        input_tokens=counters.get(semconv.PROMPT_TOKENS.name),
        output_tokens=tokens,
        tokens_per_second=tokens / seconds if tokens is not None and seconds else None,
        generate_calls=sum(step.generate_calls for step in group),
        requests=_distributions(lambda metric: _exact(recording, keys, metric)),
        tail=tails.tail(),
        concurrency=_concurrency(starts, ends, calls),
        slowest=[_request(slow) for key in keys for slow in recording.requests.slowest_of(key)],
        ranks=[RankFigures(other.process.label, other.seconds, other.phases) for other in group[1:]],
    )


def _total(
    recording: Recording, times: Sequence[StepTimes], steps: Sequence[StepFigures], tail: Tail | None
) -> TotalFigures:
    tokens = sum(step.output_tokens or 0 for step in steps)
    generating = sum((step.output_tokens or 0) / step.tokens_per_second for step in steps if step.tokens_per_second)
    first, last = min((step.start for step in times), default=0), max((step.end for step in times), default=0)
    step_seconds = Histogram()
    step_seconds.extend([step.seconds for step in steps])
    return TotalFigures(
        steps=len(steps),
        seconds=(last - first) / 1e9,
        step_seconds=sketched(step_seconds),
        phases=add_up(step.phases for step in steps),
        trainer_seconds=sum(step.trainer_seconds for step in steps),
        after=add_up(step.after for step in steps),
        output_tokens=tokens,
        tokens_per_second=tokens / generating if generating else None,
        requests=_distributions(lambda metric: sketched(_sketch(recording, metric))),
        tail=tail,
    )


def _request_times(recording: Recording, keys: Iterable[Key]) -> tuple[list[int], list[int]]:
    """Starts and ends of the requests of some steps, of all processes, on the clock of the run."""
    starts: list[int] = []
    ends: list[int] = []
    for key in keys:
        for number, process in enumerate(recording.processes):
            times = recording.requests.times.get((key, number))
            if times is not None:
                starts += [start + process.shift_ns for start in times.starts]
                ends += [end + process.shift_ns for end in times.ends]
    return starts, ends


def _concurrency(starts: Sequence[int], ends: Sequence[int], calls: Sequence[tuple[int, int]]) -> Concurrency | None:
    if not starts:
        return None
    curve = Curve(starts, ends)
    begin, end = min(min(starts), *(call[0] for call in calls)) if calls else min(starts), max(ends)
    running = [round(value, 3) for value in curve.bins(begin, end, BINS)]
    return Concurrency((end - begin) / 1e9, running, curve.peak())


def _distributions(of_metric: Callable[[str], Distribution | None]) -> dict[str, Distribution]:
    """Those of the `DISTRIBUTIONS` that have values, under their names in the report."""
    figures = {name: of_metric(metric) for metric, name in DISTRIBUTIONS.items()}
    return {name: distribution for name, distribution in figures.items() if distribution is not None}


def _exact(recording: Recording, keys: Sequence[Key], metric: str) -> Distribution | None:
    """The values of one step, on all ranks, with exact percentiles. None if there is no value."""
    values = sorted(value for key in keys for value in recording.values.get(key, {}).get(metric, ()))
    if not values:
        return None
    p50, p90, p99 = (values[(len(values) - 1) * percent // 100] for percent in (50, 90, 99))
    return Distribution(len(values), math.fsum(values) / len(values), p50, p90, p99, values[-1])


def _sketch(recording: Recording, metric: str) -> Histogram:
    """All values of the run."""
    histogram, waiting = Histogram(), array("d")
    for values in recording.values.values():
        waiting.extend(values.get(metric, ()))
        if len(waiting) >= AT_ONCE:
            histogram.extend(waiting)
            waiting = array("d")
    histogram.extend(waiting)
    return histogram


def sketched(histogram: Histogram) -> Distribution | None:
    """What a report shows of a histogram. None if it is empty."""
    if not histogram.count:
        return None
    p50, p90, p99 = map(histogram.quantile, (0.5, 0.9, 0.99))
    return Distribution(histogram.count, histogram.total / histogram.count, p50, p90, p99, histogram.maximum)


def _request(slow: SlowRequest) -> RequestFigures:
    known: dict[str, Any] = {name: slow.attributes.get(key) for name, key in _REQUEST_ATTRIBUTES.items()}
    for name, value in known.items():
        if name in _REQUEST_TEXTS:
            known[name] = None if value is None else str(value)
        elif name != "finish_reason":
            known[name] = engine_activity.number(value)
    return RequestFigures(seconds=slow.seconds, process=slow.process.label, **known)


def _ranks(groups: Sequence[Sequence[StepTimes]]) -> list[RankStraggler]:
    """For each rank, how much longer it took than the median of all ranks; the worst first.

    A straggler is a rank that keeps the others waiting. Its own work shows that, so each phase is compared by itself:
    the whole step takes equally long on all ranks.
    """
    excess: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    slowest: Counter[str] = Counter()
    shared = [group for group in groups if len(group) > 1]
    for group in shared:
        worst: defaultdict[str, float] = defaultdict(float)
        for name in {name for step in group for name in step.phases}:
            middle = statistics.median(step.phases.get(name, 0.0) for step in group)
            for step in group:
                over, label = max(step.phases.get(name, 0.0) - middle, 0.0), step.process.label
                excess[label][name] += over
                worst[label] = max(worst[label], over)
        slowest[max(worst, key=worst.__getitem__)] += 1
    stragglers: list[RankStraggler] = []
    for label, phases in excess.items():
        phase = max(phases, key=phases.__getitem__)
        stragglers.append(RankStraggler(label, len(shared), slowest[label], phase, phases[phase]))
    return sorted(stragglers, key=lambda rank: -rank.seconds_over_median)


def _servers(recording: Recording) -> list[ServerFigures]:
    """For each server, its requests and in how many steps it was the last to finish; the slowest first."""
    seconds: defaultdict[str, Histogram] = defaultdict(Histogram)
    last: Counter[str] = Counter()
    for times in recording.requests.times.values():
        for server, (_, histogram) in times.servers.items():
            seconds[server].merge(histogram)
        if len(times.servers) > 1:
            last[max(times.servers, key=lambda server: times.servers[server][0])] += 1
    figures = [
        ServerFigures(**to_json(distribution), server=server, last_in=last[server])
        for server, histogram in seconds.items()
        if (distribution := sketched(histogram)) is not None
    ]
    return sorted(figures, key=lambda server: -server.p50)
