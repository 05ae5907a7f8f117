"""Builders of PromQL expressions. The names are those of `semconv.py`, spelled as the Prometheus exporter does."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..profiling.measurement import Instrument
from ..profiling.semconv_docs import prometheus_name

CHOSEN = ('job="$job"', 'instance=~"$instance"')
"""The matchers for the run and the processes that the user of the dashboard chose."""
WINDOW = "$window"
"""The dashboard's variable for the window of a rate. Calls and syncs are rare: Grafana's `$__rate_interval` is too
short for them."""


def label(attribute: str) -> str:
    """The label that the exporter makes of an attribute's name."""
    return re.sub(r"\W", "_", attribute)


def legend(*attributes: str, text: str = "") -> str:
    """Grafana's template for a series' name: `text`, then the values of these attributes."""
    return " ".join(filter(None, [text, *("{{" + label(attribute) + "}}" for attribute in attributes)]))


def series(instrument: Instrument, where: Iterable[str] = CHOSEN, part: str = "") -> str:
    """The selector of a metric's series. `part` is `bucket`, `sum` or `count`, for a histogram only.

    Raises ValueError if `part` does not fit the kind of the instrument.
    """
    if (instrument.kind == "histogram") != bool(part):
        raise ValueError(f"{instrument.name} is a {instrument.kind}: part={part!r} does not fit")
    name = prometheus_name(instrument) + (f"_{part}" if part else "")
    return name + "{" + ", ".join(where) + "}" if where else name


def total(expression: str, *by: str) -> str:
    """The sum over all series, or one for each value of the attributes or labels `by`."""
    return f"sum by ({', '.join(map(label, by))}) ({expression})" if by else f"sum({expression})"


def rate(instrument: Instrument, *by: str, where: Iterable[str] = CHOSEN, part: str = "", window: str = WINDOW) -> str:
    """The gain per second of a counter, or of one part of a histogram."""
    return total(f"rate({series(instrument, where, part)}[{window}])", *by)


def quantile(q: float, instrument: Instrument, *by: str, where: Iterable[str] = CHOSEN, window: str = WINDOW) -> str:
    """A quantile of a histogram's values within the window, over all processes.

    It adds the buckets up, because quantiles cannot be averaged.
    """
    return f"histogram_quantile({q}, {rate(instrument, 'le', *by, where=where, part='bucket', window=window)})"


def mean(
    instrument: Instrument,
    *by: str,
    of: Instrument | None = None,
    where: Iterable[str] = CHOSEN,
    window: str = WINDOW,
) -> str:
    """The mean of a histogram's values. With `of`: its sum divided by the count of that other histogram."""
    above = rate(instrument, *by, where=where, part="sum", window=window)
    return f"{above} / {rate(of or instrument, *by, where=where, part='count', window=window)}"


def share(instrument: Instrument, whole: Instrument) -> str:
    """The seconds of `instrument` as a share of the seconds of `whole`, from 0 to 1."""
    return f"{rate(instrument, part='sum')} / {rate(whole, part='sum')}"


def newly(counter: str, window: str) -> str:
    """The growth of a counter within the window, including its first value.

    `counter` is a selector without a window. Prometheus's `increase` needs two values, and a counter of failures has no
    series before the first failure.
    """
    return f"increase({counter}[{window}]) > 0 or ({counter} > 0 unless {counter} offset {window})"
