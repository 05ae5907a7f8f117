"""A run's summary in words and tables, for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .compare import Change
from .phases import ENGINE, IDLE, REST
from .why import explain, slowest_step

MOST_STEPS = 24
"""Steps in a table: of more, the slowest and the last."""
_BLOCKS = " ▁▂▃▄▅▆▇█"


def render(summary: dict[str, Any], step: int | None = None) -> RenderableType:
    """All sections of a report, or those of one step."""
    steps = [one for one in summary["steps"] if step is None or one["step"] == step]
    parts: list[RenderableType] = [_head(summary)]
    asked = step if step is not None else slowest_step(summary)
    if asked is not None:
        parts.append(
            _section(f"why step {asked} took so long" if step is None else f"step {asked}", _said(summary, asked))
        )
    if steps:
        parts.append(_section("where the time went (seconds)", _phases(summary, steps, whole=step is None)))
    tails = _tails(summary, steps, step)
    if tails:
        parts.append(_section("the tail", *tails))
    requests = (steps[0] if step is not None and steps else summary["total"])["requests"]
    if requests:
        parts.append(_section("requests", _requests(requests)))
    slow = summary["slowest"] if step is None else [one for found in steps for one in found["slowest"]]
    if slow:
        parts.append(_section("slowest requests", _slowest(slow)))
    syncs = [sync for sync in summary["syncs"] if step is None or sync["step"] == step]
    if syncs:
        parts.append(_section("weight sync", *_syncs(syncs)))
    cycles = [cycle for cycle in summary["memory"] if step is None or cycle["step"] == step]
    if cycles:
        parts.append(_section("memory by cycle of sleep and wake-up", *_memory(cycles)))
    stragglers = list(_stragglers(summary["stragglers"])) if step is None else []
    if stragglers:
        parts.append(_section("stragglers", *stragglers))
    if summary["errors"]:
        said = [f"{one['span']} ended with {one['error']}, {_times(one['count'])}" for one in summary["errors"]]
        parts.append(_section("errors", Text("\n".join(said), style="red")))
    return Group(*parts)


def render_changes(changes: Sequence[Change], other: str, threshold: float) -> RenderableType:
    """The comparison's table, what got worse in red."""
    table = _table("", "before", "now", "change", "")
    for change in changes:
        percent = f"{change.percent:+.1f} %" if change.percent is not None else ""
        verdict = "worse" if change.worse else "better" if change.better else ""
        cells = [f"{change.name} [{change.unit}]", _figure(change.before), _figure(change.after), percent, verdict]
        table.add_row(*map(escape, cells), style="red" if change.worse else "green" if change.better else "")
    return _section(f"compared with {other} (more than {threshold:g} % counts)", table)


def _head(summary: dict[str, Any]) -> RenderableType:
    total, processes = summary["total"], summary["processes"]
    steps = f"{total['steps']} step{'s' * (total['steps'] != 1)} in {total['seconds']:.2f} s"
    who = processes[0]["process"] if len(processes) == 1 else f"{len(processes)} processes"
    tokens = f", {total['output_tokens']:,} tokens" if total["output_tokens"] else ""
    head = Text(f"{summary['run']}: {steps}, {who}, {summary['spans']:,} spans{tokens}", style="bold")
    outside = [f"{name} {seconds:.2f} s" for name, seconds in summary["outside_steps"].items()]
    return Group(head, Text(f"outside of steps: {', '.join(outside)}")) if outside else head


def _section(title: str, *content: RenderableType) -> RenderableType:
    return Group(
        Text(""), Text(title, style="bold cyan"), *(Padding(part, (0, 0, 0, 2), expand=False) for part in content)
    )


def _table(*headings: str, left: int = 1) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    for index, heading in enumerate(headings):
        table.add_column(escape(heading), justify="left" if index < left else "right", no_wrap=True)
    return table


def _said(summary: dict[str, Any], step: int) -> RenderableType:
    return Text("\n".join(f"{'' if index == 0 else '- '}{line}" for index, line in enumerate(explain(summary, step))))


def _phases(summary: dict[str, Any], steps: Sequence[dict[str, Any]], *, whole: bool) -> RenderableType:
    total = summary["total"]
    present = {name for step in steps for name in step["phases"]}
    own = sorted(present - {*ENGINE, REST}, key=lambda name: -total["phases"][name])
    shown = [*(name for name in ENGINE if name in present), *own[:5]]
    more = own[5:]
    columns = [*shown, *(["others"] if more else []), *([REST] if REST in present else [])]
    table = _table("step", "total", *columns, "idle after", "tokens/s", left=0)

    def row(label: str, seconds: float, phases: dict[str, float], idle: float | None, rate: float | None) -> None:
        parts = {**phases, "others": sum(phases.get(name, 0.0) for name in more)}
        cells = [label, f"{seconds:.3f}", *(f"{parts.get(name, 0.0):.3f}" for name in columns)]
        table.add_row(*cells, "" if idle is None else f"{idle:.3f}", "" if rate is None else f"{rate:,.0f}")

    chosen = _chosen(steps)
    for before, step in zip([None, *chosen], chosen, strict=False):
        if before is not None and steps.index(step) - steps.index(before) > 1:
            table.add_row(*["…"] * len(table.columns))
        label = f"{step['step']}{'' if step['ended'] else ' (open)'}"
        row(label, step["seconds"], step["phases"], step["after"].get(IDLE), step["tokens_per_second"])
    if whole and len(steps) > 1:
        seconds = sum(step["seconds"] for step in steps)
        row("all", seconds, total["phases"], total["after"].get(IDLE), total["tokens_per_second"])
        if seconds:
            shares = [f"{100 * total['phases'].get(name, 0.0) / seconds:.0f} %" for name in columns if name != "others"]
            table.add_row("", "", *shares[: len(shown)], *([""] if more else []), *shares[len(shown) :], "", "")
    return table


def _chosen(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(steps) <= MOST_STEPS:
        return list(steps)
    slow = sorted(range(len(steps)), key=lambda index: -steps[index]["seconds"])[: MOST_STEPS // 2]
    last = range(len(steps) - MOST_STEPS // 2, len(steps))
    return [steps[index] for index in sorted({*slow, *last})]


def _tails(summary: dict[str, Any], steps: Sequence[dict[str, Any]], step: int | None) -> list[RenderableType]:
    timed = [one for one in steps if one["tail"] is not None]
    if not timed:
        return []
    worst = max(timed, key=lambda one: one["tail"]["seconds"])
    found: list[RenderableType] = []
    whole = summary["total"]["tail"]
    if step is None and whole is not None:
        found.append(Text(f"over the run, {whole['sentence']}"))
    if step is not None or (len(timed) > 1 and worst["tail"]["long"]):
        found.append(Text(f"in step {worst['step']}, {worst['tail']['sentence']}"))
    curve = worst["concurrency"]
    if curve is not None:
        top = max(curve["peak"], 1)
        bars = "".join(_BLOCKS[min(int(value / top * 8 + 0.999), 8)] for value in curve["running"])
        found.append(
            Text(f"running at once in step {worst['step']}, of {curve['peak']}, over {curve['seconds']:.2f} s:")
        )
        found.append(Text(bars, style="green", no_wrap=True, overflow="ellipsis"))
    return found


def _requests(requests: dict[str, dict[str, float]]) -> RenderableType:
    table = _table("", "requests", "mean", "p50", "p90", "p99", "max")
    for name, one in requests.items():
        unit = "" if name == "output_tokens" else " [s]"
        figures = [_figure(one[key]) for key in ("mean", "p50", "p90", "p99", "max")]
        table.add_row(escape(name.replace("_", " ") + unit), f"{one['count']:,}", *figures)
    return table


def _slowest(found: Sequence[dict[str, Any]]) -> RenderableType:
    served = any(one["server"] for one in found)
    columns = ["step", "prompt", "completion", "seconds", "queue", "first token", "tokens", "ended by"]
    table = _table(*columns, *(["server"] if served else []), left=0)
    for one in found:
        reason = one["finish_reason"]
        reason = ", ".join(map(str, reason)) if isinstance(reason, list) else _text(reason)
        cells = [_text(one["step"]), _text(one["prompt"]), _text(one["generation"]), f"{one['seconds']:.3f}"]
        cells += [_figure(one["queue"]), _figure(one["time_to_first_token"]), _text(one["output_tokens"]), reason]
        table.add_row(*map(escape, cells), *([escape(_text(one["server"]))] if served else []))
    return table


def _syncs(syncs: Sequence[dict[str, Any]]) -> Iterator[RenderableType]:
    table = _table("phase", "seconds", "share", "median", "slowest")
    whole = sum(sync["seconds"] or 0.0 for sync in syncs)
    for name in dict.fromkeys(name for sync in syncs for name in sync["phases"]):
        own = [sync["phases"].get(name, 0.0) for sync in syncs]
        share = f"{100 * sum(own) / whole:.0f} %" if whole else ""
        table.add_row(name, f"{sum(own):.3f}", share, f"{statistics.median(own):.3f}", f"{max(own):.3f}")
    seconds = [sync["seconds"] for sync in syncs if sync["seconds"] is not None]
    if seconds:
        table.add_row("all", f"{whole:.3f}", "", f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}")
    yield table
    sent = sum(sync["bytes"] or 0 for sync in syncs)
    said = [f"{len(syncs)} sync{'s' * (len(syncs) > 1)}"]
    if sent and whole:
        said.append(f"{_bytes(sent)} at {sent / whole / 1e9:.3f} GB/s")
    paused = [sync["paused_seconds"] for sync in syncs if sync["paused_seconds"] is not None]
    if paused:
        said.append(f"generation paused for {sum(paused):.3f} s")
    waited = sum(sync["gather_seconds"] for sync in syncs)
    if waited:
        said.append(f"{waited:.3f} s of them waiting for the trainer's model")
    spread = [
        (one["slowest"] - one["median"], phase, one) for sync in syncs for phase, one in sync["receivers"].items()
    ]
    if spread:
        over, phase, one = max(spread, key=lambda found: found[0])
        if over > 0:
            said.append(f"the slowest server took {one['slowest']:.3f} s in {phase}, the median {one['median']:.3f} s")
    failed = sum(sync["error"] is not None for sync in syncs)
    if failed:
        said.append(f"{failed} failed")
    yield Text(", ".join(said))


def _memory(cycles: Sequence[dict[str, Any]]) -> Iterator[RenderableType]:
    table = _table("step", "level", "sleep s", "freed", "asleep s", "wake s", "taken", "host after", left=0)
    shown = list(cycles) if len(cycles) <= 8 else [*cycles[:4], *cycles[-4:]]
    for index, cycle in enumerate(shown):
        if len(cycles) > 8 and index == 4:
            table.add_row(*["…"] * 8)
        cells = [
            _text(cycle["step"]),
            _text(cycle["level"]),
            _figure(cycle["sleep_seconds"]),
            _bytes(cycle["freed_bytes"]),
        ]
        cells += [_figure(cycle["asleep_seconds"]), _figure(cycle["wake_seconds"]), _bytes(cycle["taken_bytes"])]
        table.add_row(*cells, _bytes(cycle["host_bytes_awake"]))
    yield table
    for process in dict.fromkeys(cycle["process"] for cycle in cycles):
        own = [cycle for cycle in cycles if cycle["process"] == process]
        for key, what in (
            ("host_bytes_awake", "the host memory of"),
            ("device_free_bytes_awake", "free device memory beside"),
        ):
            known = [cycle[key] for cycle in own if cycle[key] is not None]
            if len(known) > 1 and known[-1] != known[0]:
                grew = known[-1] - known[0]
                way = "grew" if grew > 0 else "fell"
                yield Text(f"{what} {process} {way} by {_bytes(abs(grew))} over {len(known)} cycles")


def _stragglers(stragglers: dict[str, Any]) -> Iterator[RenderableType]:
    ranks, servers = stragglers["ranks"], stragglers["servers"]
    if ranks and ranks[0]["seconds_over_median"] > 0:
        worst = ranks[0]
        yield Text(
            f"{worst['process']} kept the others waiting most: {worst['seconds_over_median']:.2f} s over the median in "
            f"{worst['phase']}, the slowest in {worst['slowest_in']} of {worst['steps']} steps"
        )
    if servers:
        table = _table("server", "requests", "p50 s", "p99 s", "max s", "last to finish")
        for one in servers:
            cells = [f"{one['count']:,}", *(f"{one[key]:.3f}" for key in ("p50", "p99", "max")), _times(one["last_in"])]
            table.add_row(escape(one["server"]), *cells)
        yield table


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _figure(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return (
        f"{value:,.0f}"
        if abs(value) >= 1000 or value == int(value)
        else f"{value:.3f}"
        if abs(value) >= 0.01
        else f"{value:.2g}"
    )


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f} B"
