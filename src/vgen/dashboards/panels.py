"""The content of the dashboard: rows of panels with their queries, as plain data. `grafana.py` makes the JSON of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..profiling import semconv
from ..profiling.measurement import Instrument
from . import vllm
from .promql import CHOSEN, label, legend, mean, quantile, rate, series, share, total

PROCESS = "instance"
"""Prometheus's label for the process that a series comes from."""
SERVERS = (f'{vllm.SERVER}=~"$server"',)
"""The matcher for the vLLM servers that the user chose. Prometheus scrapes them directly, so they have no run label."""

SYNC_PHASES = tuple(name for name in semconv.SPANS if name.startswith(semconv.WEIGHT_SYNC + "."))
REQUEST_PHASES = (semconv.REQUEST_ADMISSION, semconv.REQUEST_QUEUE, semconv.REQUEST_PREFILL, semconv.REQUEST_DECODE)
STEP_PARTS = (semconv.GENERATE, semconv.WEIGHT_SYNC, semconv.SLEEP, semconv.WAKE_UP)

Kind = Literal["lines", "stack", "number", "states", "heatmap"]
Unit = Literal["s", "bytes", "Bps", "percentunit", "short"]
_UNITS: dict[str, Unit] = {"s": "s", "By": "bytes", "By/s": "Bps"}


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression, and Grafana's template for the names of its series."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. A row is 24 columns wide."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: Unit = "short"
    kind: Kind = "lines"
    span: str | None = None
    """The span name for which the panel's link searches Jaeger."""
    failed: bool = False
    """Whether the link searches only for spans that failed."""
    width: int = 8
    states: tuple[str, ...] = ()
    """For the kind `states`: the names of the values 0, 1, …"""


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
    """Quantiles of a histogram over time, one line for each value of the attributes `by`."""
    queries = tuple(Query(quantile(q, instrument, *by, where=where), legend(*by, text=f"p{q * 100:g}")) for q in at)
    return Panel(title, instrument.description, queries, unit=_UNITS.get(instrument.unit, "short"), span=span)


def metric(
    title: str,
    instrument: Instrument,
    expression: str,
    names: str = "",
    *,
    unit: Unit | None = None,
    kind: Kind = "lines",
    span: str | None = None,
    width: int = 8,
    states: tuple[str, ...] = (),
) -> Panel:
    """One query about a metric. `names` is the template of the series' names.

    The panel has the metric's description, and its unit unless `unit` is another one.
    """
    unit = unit or _UNITS.get(instrument.unit, "short")
    queries = (Query(expression, names),)
    return Panel(title, instrument.description, queries, unit, kind, span, width=width, states=states)


def dashboard() -> tuple[Row, ...]:
    """All rows, in their order."""
    rows = {
        "Now": _overview(),
        "Rollout latency": _latency(),
        "Tail": _tail(),
        "Throughput": _throughput(),
        "Engine": _engine(),
        "Weight sync": _sync(),
        "Sleep and memory": _sleep(),
        "Telemetry health": _telemetry(),
        "vLLM's own metrics": _vllm(),
    }
    return tuple(Row(title, tuple(panels)) for title, panels in rows.items())


def _overview() -> Iterator[Panel]:
    def number(title: str, description: str, expression: str, unit: Unit = "short", span: str | None = None) -> Panel:
        return Panel(title, description, (Query(expression),), unit, "number", span, width=4)

    sync, request = semconv.duration(semconv.WEIGHT_SYNC), semconv.REQUEST_E2E
    yield number("Processes", "Processes whose metrics arrive.", f"count({_TARGETS})")
    yield number("Tokens per second", semconv.GENERATED_TOKENS.description, rate(semconv.GENERATED_TOKENS))
    yield number("Request p99", request.description, quantile(0.99, request), "s", semconv.GENERATE)
    yield number("Waiting for the tail", _WAITING_MEANING, _WAITING, "percentunit", semconv.GENERATE)
    yield number("Weight sync, mean", sync.description, mean(sync), "s", semconv.WEIGHT_SYNC)
    yield number("Telemetry lost", semconv.DROPPED.description, total(series(semconv.DROPPED)))


def _latency() -> Iterator[Panel]:
    engine, span = semconv.ENGINE, semconv.GENERATE
    phases = tuple(Query(mean(phase), phase.name.rpartition(".")[2]) for phase in REQUEST_PHASES)
    meaning = "Mean seconds of each phase of a request. The phases add up to its end-to-end time."
    yield percentiles("Generate call", semconv.duration(span), engine, span=span)
    yield percentiles("Request, end to end", semconv.REQUEST_E2E, engine, span=span)
    yield Panel("Where a request's time goes", meaning, phases, "s", "stack", span)
    yield percentiles("Time to first token", semconv.REQUEST_TTFT, engine, span=span)
    yield percentiles("Time per output token", semconv.REQUEST_TPOT, engine, span=span)
    yield percentiles("Until it reaches the engine", semconv.REQUEST_START, engine, span=span)


_TARGETS = f"target_info{{{', '.join(CHOSEN)}}}"
_CALL = semconv.duration(semconv.ENGINE_GENERATE)
_WAITING = f"1 - ({mean(semconv.REQUEST_E2E)}) / ({mean(_CALL)})"
_WAITING_MEANING = (
    "The cost of the tail: the share of an engine call in which the average sequence had already ended and the longest "
    "was still running. It is 0 if all sequences end together."
)


def _tail() -> Iterator[Panel]:
    request, span = semconv.REQUEST_E2E, semconv.GENERATE
    ratio = Query(f"{quantile(0.99, request)} / {quantile(0.5, request)}", "p99 / p50")
    ratio_meaning = "The p99 of the requests' seconds divided by the p50. A high value means a long tail."
    lengths = tuple(
        Query(quantile(q, instrument), f"{name} p{q * 100:g}")
        for name, instrument in (("completion", semconv.COMPLETION_LENGTH), ("prompt", semconv.PROMPT_LENGTH))
        for q in (0.5, 0.99)
    )
    cells = total(f"increase({series(request, part='bucket')}[$__rate_interval])", "le")
    yield Panel("Waiting for the tail", _WAITING_MEANING, (Query(_WAITING, "of the call"),), "percentunit", span=span)
    yield Panel("Request p99 over p50", ratio_meaning, (ratio,), span=span)
    yield Panel("Lengths", "Tokens of each completion, and prompt tokens of each request.", lengths, span=span)
    yield metric("Requests by duration", request, cells, "{{le}}", kind="heatmap", span=span, width=24)


def _by(
    title: str, counter: Instrument, attribute: str, span: str, *, unit: Unit | None = None, width: int = 8
) -> Panel:
    """What a counter gains each second, by an attribute."""
    return metric(title, counter, rate(counter, attribute), legend(attribute), unit=unit, span=span, width=width)


def _throughput() -> Iterator[Panel]:
    engine, span, throughput = semconv.ENGINE, semconv.GENERATE, semconv.THROUGHPUT
    tokens = tuple(
        Query(rate(counter, engine), legend(engine, text=text))
        for counter, text in ((semconv.GENERATED_TOKENS, "out"), (semconv.PROMPT_TOKENS, "in"))
    )
    tokens_meaning = "Completion tokens (out) and prompt tokens (in), averaged over the window."
    step = semconv.duration(semconv.STEP)
    parts = tuple(Query(share(semconv.duration(part), step), part) for part in STEP_PARTS)
    parts_meaning = f"The share of `{semconv.STEP}` that each engine call takes. The rest is the trainer's work."
    yield Panel("Tokens per second, over all time", tokens_meaning, tokens, span=span)
    yield metric("Tokens per second, while generating", throughput, series(throughput), legend(PROCESS), span=span)
    yield _by("Completions by what ended them", semconv.REQUEST_FINISHED, semconv.FINISHED_BY, span)
    yield _by("Prompt tokens from the prefix cache", semconv.REQUEST_CACHED, engine, span)
    yield _by("Preemptions", semconv.REQUEST_PREEMPTED, engine, span)
    yield _by("Completions with NaN log-probabilities", semconv.NAN_LOGPROBS, engine, span)
    yield Panel("Where a step's time goes", parts_meaning, parts, "percentunit", "stack", semconv.STEP)


def _engine() -> Iterator[Panel]:
    engine = (semconv.ENGINE, semconv.ENGINE_NUMBER, PROCESS)
    names, state, age = legend(*engine), semconv.ENGINE_STATE, semconv.ENGINE_STATE_AGE
    stalled, stalls, span = semconv.STALLED, semconv.STALLS, semconv.STALL
    states = semconv.STATES
    yield metric("What each engine is doing", state, series(state), names, kind="states", width=24, states=states)
    yield metric("For how long", age, series(age), names, width=12)
    yield metric("Stalled", stalled, series(stalled), names, span=span, width=6)
    yield metric("Stalls", stalls, total(series(stalls), *engine), names, span=span, width=6)


def _sync() -> Iterator[Panel]:
    span, bandwidth = semconv.WEIGHT_SYNC, semconv.SYNC_BANDWIDTH
    sync, by_error = semconv.duration(span), (semconv.ENGINE, semconv.ERROR_TYPE)
    phases = tuple(
        Query(mean(semconv.duration(phase), of=sync), phase.removeprefix(f"{span}.")) for phase in SYNC_PHASES
    )
    failed = total(series(sync, (*CHOSEN, f'{label(semconv.ERROR_TYPE)}!=""'), part="count"), *by_error)
    failed_meaning = "Weight syncs that failed since the process started, by the type of the exception."
    failures = (Query(failed, legend(*by_error)),)
    yield percentiles("Weight sync", sync, semconv.ENGINE, span=span)
    yield Panel("Phases of a sync", "Mean seconds of each phase of a sync.", phases, "s", "stack", span)
    yield metric("Bandwidth", bandwidth, series(bandwidth), legend(semconv.TRANSPORT, PROCESS), span=span)
    yield _by("Bytes sent", semconv.SYNCED_BYTES, semconv.TRANSPORT, span, unit="Bps", width=12)
    yield Panel("Failed syncs", failed_meaning, failures, span=span, failed=True, width=12)
    yield percentiles("Log-probabilities: engine and trainer apart", semconv.DRIFT, semconv.ENGINE, span=span)


def _sleep() -> Iterator[Panel]:
    span, level, leaked, used = semconv.SLEEP, semconv.SLEEP_LEVEL, semconv.LEAKED_TOTAL, semconv.MEMORY_USED
    sleeps = rate(semconv.duration(span), part="count")
    moved = tuple(
        Query(f"{rate(counter)} / {sleeps}", text)
        for counter, text in ((semconv.SLEEP_FREED, "freed"), (semconv.WAKE_TAKEN, "allocated"))
    )
    moved_meaning = "Mean device memory that a sleep freed, and that the wake-up after it allocated."
    in_use = tuple(
        Query(series(gauge), legend(PROCESS, text=text))
        for gauge, text in ((used, "device"), (semconv.MEMORY_RESIDENT, "host, the process"))
    )
    levels = legend(level, PROCESS, text="level")
    yield percentiles("Sleep", semconv.duration(span), level, span=span)
    yield percentiles("Wake up", semconv.duration(semconv.WAKE_UP), span=semconv.WAKE_UP)
    yield Panel("Device memory, each sleep", moved_meaning, moved, "bytes", span=span)
    yield Panel("Memory in use", used.description, in_use, "bytes")
    yield metric("Leaked", leaked, total(series(leaked), level, PROCESS), levels, span=span)
    yield percentiles("Device time", semconv.DEVICE_TIME, semconv.TIMED_SPAN, at=(0.5, 0.99))


def _telemetry() -> Iterator[Panel]:
    dropped, pending, sinks = semconv.DROPPED, semconv.DEVICE_PENDING, (semconv.SINK, PROCESS)
    processes = (Query(_TARGETS, legend(semconv.RANK, PROCESS, text="rank")),)
    meaning = "One line for each process whose metrics arrive. A line ends where the process or its telemetry ended."
    yield metric("Records lost", dropped, total(series(dropped), *sinks), legend(*sinks))
    yield metric("Device events not done", pending, series(pending), legend(PROCESS))
    yield Panel("Processes", meaning, processes)


def _vllm() -> Iterator[Panel]:
    server, cache, preempted = vllm.SERVER, vllm.KV_CACHE, vllm.PREEMPTIONS

    def gained(counter: Instrument, by: str = server) -> str:
        return rate(counter, by, where=SERVERS)

    requests = tuple(
        Query(total(series(gauge, SERVERS), server), legend(server, text=text))
        for gauge, text in ((vllm.RUNNING, "running"), (vllm.WAITING, "waiting"))
    )
    requests_meaning = "Requests that are running, and requests that wait to be scheduled."
    tokens = tuple(
        Query(gained(counter), legend(server, text=text))
        for counter, text in ((vllm.GENERATED, "out"), (vllm.PROMPTED, "in"))
    )
    tokens_meaning = "Generated tokens (out) and processed prompt tokens (in)."
    hits = (Query(f"{gained(vllm.PREFIX_HITS)} / {gained(vllm.PREFIX_QUERIES)}", legend(server)),)
    hits_meaning = "The share of prompt tokens that vLLM found in its prefix cache."
    asleep = (Query(series(vllm.SLEEP, SERVERS), legend(server, "sleep_state")),)
    asleep_meaning = "Whether vLLM sleeps, as vLLM reports it: the state of the line that is 1."
    reason = "finished_reason"
    yield Panel("Requests in the engine", requests_meaning, requests)
    yield metric("KV cache in use", cache, series(cache, SERVERS), legend(server), unit="percentunit")
    yield Panel("Tokens per second", tokens_meaning, tokens)
    yield percentiles("End to end, by vLLM", vllm.E2E, server, where=SERVERS)
    yield percentiles("Time to first token, by vLLM", vllm.TTFT, server, where=SERVERS)
    yield percentiles("Queue, by vLLM", vllm.QUEUE, server, where=SERVERS)
    yield Panel("Prefix cache hits", hits_meaning, hits, "percentunit", width=6)
    yield metric("Preemptions", preempted, gained(preempted), legend(server), width=6)
    yield metric("Requests ended", vllm.FINISHED, gained(vllm.FINISHED, reason), legend(reason), width=6)
    yield Panel("Asleep", asleep_meaning, asleep, width=6)
