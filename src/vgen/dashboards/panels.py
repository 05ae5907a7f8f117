"""What the dashboard shows: rows of panels with their queries. Plain data; `grafana.py` makes Grafana's JSON of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..profiling import names
from ..profiling.records import Instrument
from . import vllm
from .promql import CHOSEN, label, legend, mean, quantile, rate, series, share, total

PROCESS = "instance"
"""Prometheus's label of the process that a series comes from."""
SERVERS = (f'{vllm.SERVER}=~"$server"',)
"""The vLLM servers that the reader has chosen. They are scraped on their own, so no run is in their labels."""

SYNC_PHASES = tuple(name for name in names.SPANS if name.startswith(names.WEIGHT_SYNC + "."))
REQUEST_PHASES = (names.REQUEST_ADMISSION, names.REQUEST_QUEUE, names.REQUEST_PREFILL, names.REQUEST_DECODE)
STEP_PARTS = (names.GENERATE, names.WEIGHT_SYNC, names.SLEEP, names.WAKE_UP)

Unit = Literal["s", "bytes", "Bps", "percentunit", "short"]
_UNITS: dict[str, Unit] = {"s": "s", "By": "bytes", "By/s": "Bps"}


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression, and Grafana's template of its series' names."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of a row, which is 24 columns wide."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: Unit = "short"
    kind: Literal["lines", "stack", "number", "states", "heatmap"] = "lines"
    span: str | None = None
    """The span whose traces the panel leads to."""
    failed: bool = False
    """To those of them that failed."""
    width: int = 8
    states: tuple[str, ...] = ()
    """What the values 0, 1, ... of `states` stand for."""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def percentiles(
    title: str,
    instrument: Instrument,
    *by: str,
    span: str | None = None,
    where: Sequence[str] = CHOSEN,
    at: tuple[float, ...] = (0.5, 0.9, 0.99),
) -> Panel:
    """Quantiles of a histogram over time."""
    queries = tuple(Query(quantile(q, instrument, *by, where=where), legend(*by, text=f"p{q * 100:g}")) for q in at)
    return Panel(title, instrument.description, queries, unit=_UNITS.get(instrument.unit, "short"), span=span)


def dashboard() -> tuple[Row, ...]:
    """All rows, in their order."""
    rows = (_overview, _latency, _tail, _throughput, _engine, _sync, _sleep, _telemetry, _vllm)
    return tuple(row() for row in rows)


def _overview() -> Row:
    def number(title: str, description: str, expression: str, unit: Unit, span: str | None = None) -> Panel:
        return Panel(title, description, (Query(expression),), unit, "number", span, width=4)

    sync = names.duration(names.WEIGHT_SYNC)
    return Row(
        "Now",
        (
            number("Processes", "Processes whose metrics arrive.", f"count({_TARGETS})", "short"),
            number("Tokens per second", names.GENERATED_TOKENS.description, rate(names.GENERATED_TOKENS), "short"),
            number(
                "Request p99", names.REQUEST_E2E.description, quantile(0.99, names.REQUEST_E2E), "s", names.GENERATE
            ),
            number("Waiting for the tail", _WAITING_SAYS, _WAITING, "percentunit", names.GENERATE),
            number("Weight sync, mean", sync.description, mean(sync), "s", names.WEIGHT_SYNC),
            number("Telemetry lost", names.DROPPED.description, total(series(names.DROPPED)), "short"),
        ),
    )


def _latency() -> Row:
    anatomy = tuple(Query(mean(phase), phase.name.rpartition(".")[2]) for phase in REQUEST_PHASES)
    return Row(
        "Rollout latency",
        (
            percentiles("Generate call", names.duration(names.GENERATE), names.ENGINE, span=names.GENERATE),
            percentiles("Request, end to end", names.REQUEST_E2E, names.ENGINE, span=names.GENERATE),
            Panel(
                "Where a request's time goes",
                "Mean seconds of each phase of a request; together they are its time from end to end.",
                anatomy,
                "s",
                "stack",
                names.GENERATE,
            ),
            percentiles("Time to first token", names.REQUEST_TTFT, names.ENGINE, span=names.GENERATE),
            percentiles("Time per output token", names.REQUEST_TPOT, names.ENGINE, span=names.GENERATE),
            percentiles("Until it reaches the engine", names.REQUEST_START, names.ENGINE, span=names.GENERATE),
        ),
    )


_TARGETS = f"target_info{{{', '.join(CHOSEN)}}}"
_CALL = names.duration(names.ENGINE_GENERATE)
_WAITING = f"1 - ({mean(names.REQUEST_E2E)}) / ({mean(_CALL)})"
_WAITING_SAYS = (
    "The part of an engine call for which the average sequence had already ended and the longest had not: what the "
    "tail costs. 0 when all end together."
)


def _tail() -> Row:
    ratio = f"{quantile(0.99, names.REQUEST_E2E)} / {quantile(0.5, names.REQUEST_E2E)}"
    cells = f"increase({series(names.REQUEST_E2E, part='bucket')}[$__rate_interval])"
    return Row(
        "Tail",
        (
            Panel(
                "Waiting for the tail",
                _WAITING_SAYS,
                (Query(_WAITING, "of the call"),),
                "percentunit",
                span=names.GENERATE,
            ),
            Panel(
                "Request p99 over p50",
                "How many times as long as the median request the slowest hundredth takes.",
                (Query(ratio, "p99 / p50"),),
                span=names.GENERATE,
            ),
            Panel(
                "Lengths",
                "Tokens of completions, and prompt tokens of requests.",
                (
                    Query(quantile(0.5, names.COMPLETION_LENGTH), "completion p50"),
                    Query(quantile(0.99, names.COMPLETION_LENGTH), "completion p99"),
                    Query(quantile(0.5, names.PROMPT_LENGTH), "prompt p50"),
                    Query(quantile(0.99, names.PROMPT_LENGTH), "prompt p99"),
                ),
                span=names.GENERATE,
            ),
            Panel(
                "Requests by duration",
                names.REQUEST_E2E.description,
                (Query(total(cells, "le"), "{{le}}"),),
                "s",
                "heatmap",
                names.GENERATE,
                width=24,
            ),
        ),
    )


def _throughput() -> Row:
    step = names.duration(names.STEP)
    parts = tuple(Query(share(names.duration(part), step), part) for part in STEP_PARTS)
    return Row(
        "Throughput",
        (
            Panel(
                "Tokens per second, over all time",
                "Completion and prompt tokens, of the whole run.",
                (
                    Query(rate(names.GENERATED_TOKENS, names.ENGINE), legend(names.ENGINE, text="out")),
                    Query(rate(names.PROMPT_TOKENS, names.ENGINE), legend(names.ENGINE, text="in")),
                ),
                span=names.GENERATE,
            ),
            Panel(
                "Tokens per second, while generating",
                names.THROUGHPUT.description,
                (Query(series(names.THROUGHPUT), legend(PROCESS)),),
                span=names.GENERATE,
            ),
            Panel(
                "Completions by what ended them",
                names.REQUEST_FINISHED.description,
                (Query(rate(names.REQUEST_FINISHED, names.FINISHED_BY), legend(names.FINISHED_BY)),),
                span=names.GENERATE,
            ),
            Panel(
                "Prompt tokens from the prefix cache",
                names.REQUEST_CACHED.description,
                (Query(rate(names.REQUEST_CACHED, names.ENGINE), legend(names.ENGINE)),),
                span=names.GENERATE,
            ),
            Panel(
                "Preemptions",
                names.REQUEST_PREEMPTED.description,
                (Query(rate(names.REQUEST_PREEMPTED, names.ENGINE), legend(names.ENGINE)),),
                span=names.GENERATE,
            ),
            Panel(
                "Where a step's time goes",
                f"Share of `{names.STEP}` in each of its parts; the rest is the trainer's.",
                parts,
                "percentunit",
                "stack",
                names.STEP,
            ),
        ),
    )


def _engine() -> Row:
    who = (names.ENGINE, names.ENGINE_NUMBER, PROCESS)
    return Row(
        "Engine",
        (
            Panel(
                "What each engine is doing",
                names.ENGINE_STATE.description,
                (Query(series(names.ENGINE_STATE), legend(*who)),),
                kind="states",
                width=24,
                states=names.STATES,
            ),
            Panel(
                "For how long",
                names.ENGINE_STATE_AGE.description,
                (Query(series(names.ENGINE_STATE_AGE), legend(*who)),),
                "s",
                width=12,
            ),
            Panel(
                "Stalled",
                names.STALLED.description,
                (Query(series(names.STALLED), legend(*who)),),
                "s",
                span=names.STALL,
                width=6,
            ),
            Panel(
                "Stalls",
                names.STALLS.description,
                (Query(total(series(names.STALLS), *who), legend(*who)),),
                span=names.STALL,
                width=6,
            ),
        ),
    )


def _sync() -> Row:
    sync = names.duration(names.WEIGHT_SYNC)
    phases = tuple(
        Query(mean(names.duration(phase), of=sync), phase.removeprefix(names.WEIGHT_SYNC + "."))
        for phase in SYNC_PHASES
    )
    failed = total(
        series(sync, (*CHOSEN, f'{label(names.ERROR_TYPE)}!=""'), part="count"), names.ENGINE, names.ERROR_TYPE
    )
    return Row(
        "Weight sync",
        (
            percentiles("Weight sync", sync, names.ENGINE, span=names.WEIGHT_SYNC),
            Panel(
                "Phases of a sync",
                "Mean seconds of each phase, for each sync.",
                phases,
                "s",
                "stack",
                names.WEIGHT_SYNC,
            ),
            Panel(
                "Bandwidth",
                names.SYNC_BANDWIDTH.description,
                (Query(series(names.SYNC_BANDWIDTH), legend(names.TRANSPORT, PROCESS)),),
                "Bps",
                span=names.WEIGHT_SYNC,
            ),
            Panel(
                "Bytes sent",
                names.SYNCED_BYTES.description,
                (Query(rate(names.SYNCED_BYTES, names.TRANSPORT), legend(names.TRANSPORT)),),
                "Bps",
                span=names.WEIGHT_SYNC,
                width=12,
            ),
            Panel(
                "Failed syncs",
                "Weight syncs that ended with an error, since the process began, by the type of the error.",
                (Query(failed, legend(names.ENGINE, names.ERROR_TYPE)),),
                span=names.WEIGHT_SYNC,
                failed=True,
                width=12,
            ),
        ),
    )


_LEVEL = legend(names.SLEEP_LEVEL, PROCESS, text="level")


def _sleep() -> Row:
    sleeps = rate(names.duration(names.SLEEP), part="count")
    return Row(
        "Sleep and memory",
        (
            percentiles("Sleep", names.duration(names.SLEEP), names.SLEEP_LEVEL, span=names.SLEEP),
            percentiles("Wake up", names.duration(names.WAKE_UP), span=names.WAKE_UP),
            Panel(
                "Device memory, each sleep",
                "What a sleep gave back on average, and what waking up after it took.",
                (
                    Query(f"{rate(names.SLEEP_FREED)} / {sleeps}", "given back"),
                    Query(f"{rate(names.WAKE_TAKEN)} / {sleeps}", "taken"),
                ),
                "bytes",
                span=names.SLEEP,
            ),
            Panel(
                "Memory in use",
                names.MEMORY_USED.description,
                (
                    Query(series(names.MEMORY_USED), legend(PROCESS, text="device")),
                    Query(series(names.MEMORY_RESIDENT), legend(PROCESS, text="host, the process")),
                ),
                "bytes",
            ),
            Panel(
                "Leaked",
                names.LEAKED_TOTAL.description,
                (Query(total(series(names.LEAKED_TOTAL), names.SLEEP_LEVEL, PROCESS), _LEVEL),),
                "bytes",
                span=names.SLEEP,
            ),
            percentiles("Device time", names.DEVICE_TIME, names.TIMED_SPAN, at=(0.5, 0.99)),
        ),
    )


def _telemetry() -> Row:
    return Row(
        "Telemetry health",
        (
            Panel(
                "Records lost",
                names.DROPPED.description,
                (Query(total(series(names.DROPPED), names.SINK, PROCESS), legend(names.SINK, PROCESS)),),
            ),
            Panel(
                "Device events not done",
                names.DEVICE_PENDING.description,
                (Query(series(names.DEVICE_PENDING), legend(PROCESS)),),
            ),
            Panel(
                "Processes",
                "One line for each process whose metrics arrive: where it ends, the process or its telemetry did.",
                (Query(_TARGETS, legend(names.RANK, PROCESS, text="rank")),),
            ),
        ),
    )


def _vllm() -> Row:
    def per_server(expression: str, text: str) -> Query:
        return Query(expression, legend(vllm.SERVER, text=text))

    hits = rate(vllm.PREFIX_HITS, vllm.SERVER, where=SERVERS)
    queries = rate(vllm.PREFIX_QUERIES, vllm.SERVER, where=SERVERS)
    ended = rate(vllm.FINISHED, "finished_reason", where=SERVERS)
    return Row(
        "vLLM's own metrics",
        (
            Panel(
                "Requests in the engine",
                "Running and waiting.",
                (
                    per_server(total(series(vllm.RUNNING, SERVERS), vllm.SERVER), "running"),
                    per_server(total(series(vllm.WAITING, SERVERS), vllm.SERVER), "waiting"),
                ),
            ),
            Panel(
                "KV cache in use",
                vllm.KV_CACHE.description,
                (per_server(series(vllm.KV_CACHE, SERVERS), ""),),
                "percentunit",
            ),
            Panel(
                "Tokens per second",
                "Generated, and processed of prompts.",
                (
                    per_server(rate(vllm.GENERATED, vllm.SERVER, where=SERVERS), "out"),
                    per_server(rate(vllm.PROMPTED, vllm.SERVER, where=SERVERS), "in"),
                ),
            ),
            percentiles("End to end, by vLLM", vllm.E2E, vllm.SERVER, where=SERVERS),
            percentiles("Time to first token, by vLLM", vllm.TTFT, vllm.SERVER, where=SERVERS),
            percentiles("Queue, by vLLM", vllm.QUEUE, vllm.SERVER, where=SERVERS),
            Panel(
                "Prefix cache hits",
                "Share of the prompt tokens that were in the prefix cache.",
                (per_server(f"{hits} / {queries}", ""),),
                "percentunit",
                width=6,
            ),
            Panel(
                "Preemptions",
                vllm.PREEMPTIONS.description,
                (per_server(rate(vllm.PREEMPTIONS, vllm.SERVER, where=SERVERS), ""),),
                width=6,
            ),
            Panel("Requests ended", vllm.FINISHED.description, (Query(ended, "{{finished_reason}}"),), width=6),
            Panel(
                "Asleep",
                "vLLM's own view of its sleep: the line that is 1 names the state.",
                (Query(series(vllm.SLEEP, SERVERS), legend(vllm.SERVER, "sleep_state")),),
                width=6,
            ),
        ),
    )
