"""PromQL about vgen's metrics: their names are those of `names.py`, in the exporter's one spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..profiling.records import Instrument
from ..profiling.reference import prometheus_name

CHOSEN = ('job="$job"', 'instance=~"$instance"')
"""Of the dashboard: the run and the processes that its reader has chosen."""
WINDOW = "$window"
"""Of the dashboard: how far back a rate looks. Calls and syncs are seldom: `$__rate_interval` would miss them."""


def label(attribute: str) -> str:
    """How an attribute is spelled as a label."""
    return re.sub(r"\W", "_", attribute)


def legend(*attributes: str, text: str = "") -> str:
    """Grafana's template of a series' name: `text`, and the values of these attributes."""
    return " ".join(filter(None, [text, *("{{" + label(attribute) + "}}" for attribute in attributes)]))


def series(instrument: Instrument, where: Iterable[str] = CHOSEN, part: str = "") -> str:
    """All series of the metric. `part` is `bucket`, `sum` or `count` of a histogram."""
    if (instrument.kind == "histogram") != bool(part):
        raise ValueError(f"{instrument.name} is a {instrument.kind}: part={part!r} does not fit")
    name = prometheus_name(instrument) + (f"_{part}" if part else "")
    return name + "{" + ", ".join(where) + "}" if where else name


def total(expression: str, *by: str) -> str:
    """The sum over all series, or one for each value of the attributes or labels `by`."""
    return f"sum by ({', '.join(map(label, by))}) ({expression})" if by else f"sum({expression})"


def rate(instrument: Instrument, *by: str, where: Iterable[str] = CHOSEN, part: str = "", window: str = WINDOW) -> str:
    """What the counter, or that part of the histogram, gains each second."""
    return total(f"rate({series(instrument, where, part)}[{window}])", *by)


def quantile(q: float, instrument: Instrument, *by: str, where: Iterable[str] = CHOSEN, window: str = WINDOW) -> str:
    """A quantile of a histogram's values within the window, over all processes: buckets add up, quantiles do not."""
    return f"histogram_quantile({q}, {rate(instrument, 'le', *by, where=where, part='bucket', window=window)})"


def mean(
    instrument: Instrument,
    *by: str,
    of: Instrument | None = None,
    where: Iterable[str] = CHOSEN,
    window: str = WINDOW,
) -> str:
    """The mean of a histogram's values; with `of`, its sum for each value of that other histogram."""
    above = rate(instrument, *by, where=where, part="sum", window=window)
    return f"{above} / {rate(of or instrument, *by, where=where, part='count', window=window)}"


def share(instrument: Instrument, whole: Instrument) -> str:
    """Which part of the seconds of `whole` were those of `instrument`, from 0 to 1."""
    return f"{rate(instrument, part='sum')} / {rate(whole, part='sum')}"


def newly(counter: str, window: str) -> str:
    """By how much `counter` (a vector of series, without a window) grew within it; its first value counts too.

    Prometheus's `increase` needs two values, and a counter of failures is not there before the first failure.
    """
    return f"increase({counter}[{window}]) > 0 or ({counter} > 0 unless {counter} offset {window})"
