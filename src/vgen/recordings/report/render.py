"""The report on a run for a terminal, section by section."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .compare import Change
from .figure_types import Distribution, RequestFigures, RunFigures, SleepCycle, StepFigures, SyncFigures
from .phases import ENGINE, IDLE, REST
from .verdict import explain, slowest_step

MOST_STEPS = 24
"""Steps that the table shows. Of more: the slowest and the last."""
MOST_CYCLES = 8
"""Cycles of sleep and wake-up that the table shows. Of more: the first and the last."""
MOST_SPANS = 5
"""The caller's spans that get a column of their own."""
_Record = TypeVar("_Record", StepFigures, SyncFigures, SleepCycle)
_BLOCKS = " ▁▂▃▄▅▆▇█"
_PERCENTILES = ("mean", "p50", "p90", "p99", "max")


def render(run: RunFigures, step: int | None = None) -> RenderableType:
    """All sections of a report, or those of one step. Sections without content are left out."""
    steps = _of_step(run.steps, step)
    asked = step if step is not None else slowest_step(run)
    requests = run.total.requests if step is None or not steps else steps[0].requests
    slowest = run.slowest if step is None else [slow for one in steps for slow in one.slowest]
    syncs, cycles = _of_step(run.syncs, step), _of_step(run.memory, step)
    sections: dict[str, Iterable[RenderableType]] = {
        f"why step {asked} took so long" if step is None else f"step {step}": _verdict(run, asked),
        "where the time went (seconds)": _steps(run, steps, whole=step is None) if steps else (),
        "the tail": _tails(run, steps, whole=step is None),
        "requests": _requests(requests) if requests else (),
        "slowest requests": _slowest(slowest) if slowest else (),
        "weight sync": _syncs(syncs) if syncs else (),
        "memory by cycle of sleep and wake-up": _memory(cycles) if cycles else (),
        "stragglers": _stragglers(run) if step is None else (),
        "errors": _errors(run),
    }
    contents = {title: list(content) for title, content in sections.items()}
    return Group(_head(run), *(_section(title, *content) for title, content in contents.items() if content))


def _of_step(records: Sequence[_Record], step: int | None) -> list[_Record]:
    """The records of a step; with None, all."""
    return [record for record in records if step in (None, record.step)]


def render_changes(changes: Sequence[Change], other: str, threshold: float) -> RenderableType:
    """The table of a comparison. What got worse is red."""
    table = _table("", "before", "now", "change", "")
    for change in changes:
        percent = f"{change.percent:+.1f} %" if change.percent is not None else ""
        verdict = "worse" if change.worse else "better" if change.better else ""
        cells = [f"{change.name} [{change.unit}]", _number(change.before), _number(change.after), percent, verdict]
        table.add_row(*map(escape, cells), style="red" if change.worse else "green" if change.better else "")
    return _section(f"compared with {other} (more than {threshold:g} % counts)", table)


def _head(run: RunFigures) -> RenderableType:
    total = run.total
    steps = f"{total.steps} step{'s' * (total.steps != 1)} in {total.seconds:.2f} s"
    processes = run.processes[0].process if len(run.processes) == 1 else f"{len(run.processes)} processes"
    tokens = f", {total.output_tokens:,} tokens" if total.output_tokens else ""
    head = Text(f"{run.run}: {steps}, {processes}, {run.spans:,} spans{tokens}", style="bold")
    outside = [f"{name} {seconds:.2f} s" for name, seconds in run.outside_steps.items()]
    return Group(head, Text(f"outside of steps: {', '.join(outside)}")) if outside else head


def _section(title: str, *content: RenderableType) -> RenderableType:
    indented = (Padding(part, (0, 0, 0, 2), expand=False) for part in content)
    return Group(Text(""), Text(title, style="bold cyan"), *indented)


def _table(*headings: str, left: int = 1) -> Table:
    """A table whose first `left` columns are aligned to the left."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    for index, heading in enumerate(headings):
        table.add_column(escape(heading), justify="left" if index < left else "right", no_wrap=True)
    return table


def _add_ellipsis(table: Table) -> None:
    table.add_row(*["…"] * len(table.columns))


def _verdict(run: RunFigures, step: int | None) -> Iterator[RenderableType]:
    sentences = explain(run, step) if step is not None else []
    if sentences:
        yield Text("\n- ".join(sentences))


def _steps(run: RunFigures, steps: Sequence[StepFigures], *, whole: bool) -> Iterator[RenderableType]:
    """A row for each step, a column for each phase; for the whole run the sums and shares too."""
    total = run.total
    present = {name for step in steps for name in step.phases}
    spans = sorted(present - {*ENGINE, REST}, key=lambda name: -total.phases[name])
    others = spans[MOST_SPANS:]
    columns = [*(name for name in ENGINE if name in present), *spans[:MOST_SPANS]]
    columns += [*(["others"] if others else []), *([REST] if REST in present else [])]
    table = _table("step", "total", *columns, "idle after", "tokens/s", left=0)

    def row(label: str, seconds: float, phases: Mapping[str, float], idle: float | None, rate: float | None) -> None:
        parts = {**phases, "others": sum(phases.get(name, 0.0) for name in others)}
        cells = [label, f"{seconds:.3f}", *(f"{parts.get(name, 0.0):.3f}" for name in columns)]
        table.add_row(*cells, "" if idle is None else f"{idle:.3f}", "" if rate is None else f"{rate:,.0f}")

    previous = -1
    for index in _most_telling(steps):
        if previous >= 0 and index - previous > 1:
            _add_ellipsis(table)
        step, previous = steps[index], index
        label = f"{step.step}{'' if step.ended else ' (open)'}"
        row(label, step.seconds, step.phases, step.after.get(IDLE), step.tokens_per_second)
    if whole and len(steps) > 1:
        seconds = sum(step.seconds for step in steps)
        row("all", seconds, total.phases, total.after.get(IDLE), total.tokens_per_second)
        if seconds:
            shares = (f"{100 * total.phases.get(name, 0.0) / seconds:.0f} %" for name in columns)
            cells = ("" if name == "others" else share for name, share in zip(columns, shares, strict=True))
            table.add_row("", "", *cells, "", "")
    yield table


def _most_telling(steps: Sequence[StepFigures]) -> list[int]:
    """The positions of the steps to show."""
    if len(steps) <= MOST_STEPS:
        return list(range(len(steps)))
    slowest = sorted(range(len(steps)), key=lambda index: -steps[index].seconds)[: MOST_STEPS // 2]
    return sorted({*slowest, *range(len(steps) - MOST_STEPS // 2, len(steps))})


def _tails(run: RunFigures, steps: Sequence[StepFigures], *, whole: bool) -> Iterator[RenderableType]:
    """The tail of the run and of its worst step, and how many requests ran at once in that step."""
    timed = [(step.tail, step) for step in steps if step.tail is not None]
    if not timed:
        return
    tail, worst = max(timed, key=lambda one: one[0].seconds)
    if whole and run.total.tail is not None:
        yield Text(f"over the run, {run.total.tail.sentence}")
    if not whole or (len(timed) > 1 and tail.long):
        yield Text(f"in step {worst.step}, {tail.sentence}")
    curve = worst.concurrency
    if curve is not None:
        top = max(curve.peak, 1)
        bars = "".join(_BLOCKS[min(int(value / top * 8 + 0.999), 8)] for value in curve.running)
        yield Text(f"running at once in step {worst.step}, of {curve.peak}, over {curve.seconds:.2f} s:")
        yield Text(bars, style="green", no_wrap=True, overflow="ellipsis")


def _requests(requests: Mapping[str, Distribution]) -> Iterator[RenderableType]:
    table = _table("", "requests", *_PERCENTILES)
    for name, one in requests.items():
        unit = "" if name == "output_tokens" else " [s]"
        numbers = (_number(getattr(one, key)) for key in _PERCENTILES)
        table.add_row(escape(name.replace("_", " ") + unit), f"{one.count:,}", *numbers)
    yield table


def _slowest(requests: Sequence[RequestFigures]) -> Iterator[RenderableType]:
    served = any(one.server for one in requests)
    columns = ["step", "prompt", "completion", "seconds", "queue", "first token", "tokens", "ended by"]
    table = _table(*columns, *(["server"] if served else []), left=0)
    for one in requests:
        reason = one.finish_reason
        reason = ", ".join(map(str, reason)) if isinstance(reason, list) else reason
        cells = [one.step, one.prompt, one.generation, f"{one.seconds:.3f}", _number(one.queue)]
        cells += [_number(one.time_to_first_token), one.output_tokens, reason, *([one.server] if served else [])]
        table.add_row(*(escape(_text(cell)) for cell in cells))
    yield table


def _syncs(syncs: Sequence[SyncFigures]) -> Iterator[RenderableType]:
    """A row for each phase, and a sentence."""
    table = _table("phase", "seconds", "share", "median", "slowest")
    seconds = [sync.seconds for sync in syncs if sync.seconds is not None]
    phases = dict.fromkeys(name for sync in syncs for name in sync.phases)
    rows = {name: [sync.phases.get(name, 0.0) for sync in syncs] for name in phases}
    for name, took in {**rows, **({"all": seconds} if seconds else {})}.items():
        share = f"{100 * sum(took) / sum(seconds):.0f} %" if name in phases and sum(seconds) else ""
        table.add_row(escape(name), f"{sum(took):.3f}", share, f"{statistics.median(took):.3f}", f"{max(took):.3f}")
    yield table
    yield Text(", ".join(_sync_facts(syncs, sum(seconds))))


def _sync_facts(syncs: Sequence[SyncFigures], seconds: float) -> Iterator[str]:
    """What the sentence says. `seconds` are those of all syncs."""
    yield f"{len(syncs)} sync{'s' * (len(syncs) > 1)}"
    sent = sum(sync.bytes or 0 for sync in syncs)
    if sent and seconds:
        yield f"{_bytes(sent)} at {sent / seconds / 1e9:.3f} GB/s"
    paused = [sync.paused_seconds for sync in syncs if sync.paused_seconds is not None]
    if paused:
        yield f"generation paused for {sum(paused):.3f} s"
    waited = sum(sync.gather_seconds for sync in syncs)
    if waited:
        yield f"{waited:.3f} s of them waiting for the trainer's model"
    receivers = [(phase, times) for sync in syncs for phase, times in sync.receivers.items()]
    if receivers:
        phase, times = max(receivers, key=lambda one: one[1].slowest - one[1].median)
        if times.slowest > times.median:
            yield f"the slowest server took {times.slowest:.3f} s in {phase}, the median {times.median:.3f} s"
    failed = sum(sync.error is not None for sync in syncs)
    if failed:
        yield f"{failed} failed"


def _memory(cycles: Sequence[SleepCycle]) -> Iterator[RenderableType]:
    """A row for each cycle, and a sentence for each process whose memory grew or fell."""
    table = _table("step", "level", "sleep s", "freed", "asleep s", "wake s", "taken", "host after", left=0)
    half = MOST_CYCLES // 2
    for cycle in cycles if len(cycles) <= MOST_CYCLES else [*cycles[:half], None, *cycles[-half:]]:
        if cycle is None:
            _add_ellipsis(table)
            continue
        cells = [_text(cycle.step), escape(_text(cycle.level)), _number(cycle.sleep_seconds), _bytes(cycle.freed_bytes)]
        cells += [_number(cycle.asleep_seconds), _number(cycle.wake_seconds), _bytes(cycle.taken_bytes)]
        table.add_row(*cells, _bytes(cycle.host_bytes_awake))
    yield table
    for process in dict.fromkeys(cycle.process for cycle in cycles):
        of_process = [cycle for cycle in cycles if cycle.process == process]
        yield from _growth(f"the host memory of {process}", [cycle.host_bytes_awake for cycle in of_process])
        free = [cycle.device_free_bytes_awake for cycle in of_process]
        yield from _growth(f"free device memory beside {process}", free)


def _growth(what: str, values: Sequence[float | None]) -> Iterator[RenderableType]:
    known = [value for value in values if value is not None]
    if len(known) > 1 and known[-1] != known[0]:
        way = "grew" if known[-1] > known[0] else "fell"
        yield Text(f"{what} {way} by {_bytes(abs(known[-1] - known[0]))} over {len(known)} cycles")


def _stragglers(run: RunFigures) -> Iterator[RenderableType]:
    ranks, servers = run.stragglers.ranks, run.stragglers.servers
    if ranks and ranks[0].seconds_over_median > 0:
        worst = ranks[0]
        yield Text(
            f"{worst.process} kept the others waiting most: {worst.seconds_over_median:.2f} s over the median in "
            f"{worst.phase}, the slowest in {worst.slowest_in} of {worst.steps} steps"
        )
    if servers:
        table = _table("server", "requests", "p50 s", "p99 s", "max s", "last to finish")
        for one in servers:
            seconds = (f"{value:.3f}" for value in (one.p50, one.p99, one.max))
            table.add_row(escape(one.server), f"{one.count:,}", *seconds, _times(one.last_in))
        yield table


def _errors(run: RunFigures) -> Iterator[RenderableType]:
    for one in run.errors:
        yield Text(f"{one.span} ended with {one.error}, {_times(one.count)}", style="red")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f} B"
