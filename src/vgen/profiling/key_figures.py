"""The few numbers of a step that belong into a trainer's own log, or into W&B."""

from __future__ import annotations

from collections.abc import Mapping

from . import semconv

PREFIX = "vgen/"
_SPANS = (
    *(semconv.STEP, semconv.GENERATE, semconv.WEIGHT_SYNC, semconv.SYNC_PAUSE),
    *(semconv.SLEEP, semconv.WAKE_UP, semconv.STALL),
)
_TOTALS = (semconv.GENERATED_TOKENS, semconv.REQUEST_PREEMPTED, semconv.SYNCED_BYTES, semconv.DROPPED)
_LAST = (semconv.THROUGHPUT, semconv.SYNC_BANDWIDTH, semconv.MEMORY_USED, semconv.LEAKED_TOTAL)
_PARTS = (
    (semconv.REQUEST_E2E, ("p50", "p90", "p99", "max")),
    (semconv.REQUEST_QUEUE, ("p99",)),
    (semconv.REQUEST_TTFT, ("p99",)),
    (semconv.REQUEST_TPOT, ("p99",)),
    (semconv.COMPLETION_LENGTH, ("mean", "max")),
    (semconv.PROMPT_LENGTH, ("mean",)),
    (semconv.DRIFT, ("mean",)),
)

HISTOGRAMS = frozenset({semconv.REQUEST_E2E.name, semconv.COMPLETION_LENGTH.name})
"""The distributions that belong there as well."""
_VGENS = (*semconv.RESERVED, f"{semconv.STEP}.duration.")


def log_key(name: str) -> str:
    """The key in a trainer's log, or in W&B, for `name` of a step's summary."""
    return PREFIX + name.removeprefix("vgen.")


def key_figures(summary: Mapping[str, float]) -> dict[str, float]:
    """Choose at most 30 of the numbers of `Step.summary`, besides what the caller measured himself.

    Those are the seconds of each span that he named, and all numbers of his own instruments; one whose name ends in
    `.duration` looks like a span. What did not happen is 0: seconds of spans, and what is counted. Means are added
    (`vgen.completion.length.mean`), and counts of values that are no numbers (`.nonfinite`) where there were any.
    """
    figures = {f"{name}.duration.sum": 0.0 for name in _SPANS} | {total.name: 0.0 for total in _TOTALS}
    figures |= {name: summary[name] for name in figures if name in summary}
    figures |= {last.name: summary[last.name] for last in _LAST if last.name in summary}
    for instrument, parts in _PARTS:
        if odd := summary.get(f"{instrument.name}.nonfinite"):
            figures[f"{instrument.name}.nonfinite"] = odd
        if count := summary.get(f"{instrument.name}.count"):
            values = {**summary, f"{instrument.name}.mean": summary[f"{instrument.name}.sum"] / count}
            figures |= {f"{instrument.name}.{part}": values[f"{instrument.name}.{part}"] for part in parts}
    own = (name for name in summary if not name.startswith(_VGENS))
    return figures | {name: summary[name] for name in own if ".duration." not in name or name.endswith(".sum")}
