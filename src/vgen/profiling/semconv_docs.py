"""The page of all telemetry names, made from `semconv.py`, and a check that a run has no other names.

python -m vgen.profiling.semconv_docs > docs/telemetry.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from . import semconv
from .measurement import Instrument

_UNITS = {"s": "seconds", "By": "bytes", "1": ""}

HEAD = """# Telemetry reference

This page is made from `src/vgen/profiling/semconv.py` by `python -m vgen.profiling.semconv_docs`. Change it there.

A name is the same in every sink. Your own names, such as `profiling.span("reward")`, must not start with `vgen.`,
`gen_ai.` or `rl.`. vgen never records keys. It records the text of prompts and completions and the messages of
exceptions only if you turn content capture on ([sinks.md](sinks.md#what-is-never-recorded)).
"""


def page() -> str:
    """Return the whole of `docs/telemetry.md`."""
    return "\n".join([HEAD, *_spans(), *_metrics(), *_attributes(), *_other_names()])


def prometheus_name(instrument: Instrument) -> str:
    """Return the metric's name in Prometheus, as OpenTelemetry's exporter spells it.

    A histogram has the series `<name>_bucket`, `<name>_sum` and `<name>_count`.
    https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/
    """
    name = re.sub(r"[^a-zA-Z0-9:]+", "_", instrument.name)
    amount, _, time = re.sub(r"{.*?}", "", instrument.unit).partition("/")
    unit = _UNITS.get(amount, amount)
    if time:
        unit = f"{unit}_per_second".lstrip("_")
    if unit and not name.endswith("_" + unit):
        name += "_" + unit
    return name + ("_total" if instrument.kind == "counter" else "")


def unknown(spans: Iterable[Any], measurements: Iterable[Any] = ()) -> list[str]:
    """Return one sentence for each name in vgen's namespaces that `semconv.py` does not list.

    Takes the spans and measurements of a `MemorySink`, or of a `Run` that was read from files.

        assert not unknown(sink.spans, sink.measurements)
    """
    problems: list[str] = []
    for span in spans:
        problems += _unlisted("span", span.name, span.attributes, semconv.SPANS)
        for event in span.events:
            problems += _unlisted("event", _field(event, "name"), _field(event, "attributes"), semconv.EVENTS)
    for measurement in measurements:
        name = _field(measurement, "name") if isinstance(measurement, dict) else measurement.instrument.name
        problems += _unlisted("metric", name, _field(measurement, "attributes"), semconv.METRICS)
    return list(dict.fromkeys(problems))


def _field(record: Any, field: str) -> Any:
    """A field of a record: a dict if it was read from a file, otherwise an object."""
    return record[field] if isinstance(record, dict) else getattr(record, field)  # pyright: ignore[reportUnknownVariableType]


def _unlisted(kind: str, name: str, attributes: Iterable[str], listed: Iterable[str]) -> Iterator[str]:
    if name.startswith(semconv.RESERVED) and name not in listed:
        yield f"{kind} {name} is not in semconv.py"
    for attribute in attributes:
        if attribute.startswith(semconv.RESERVED) and attribute not in semconv.ATTRIBUTES:
            yield f"attribute {attribute} of {kind} {name} is not in semconv.py"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    columns = tuple(columns)
    for cells in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(cells)} |"


def _codes(items: Iterable[str]) -> str:
    return ", ".join(f"`{item}`" for item in items)


def _numbers(bounds: Iterable[float]) -> str:
    return ", ".join(f"{bound:g}" if bound < 1e6 else f"{int(bound)}" for bound in bounds)


def _spans() -> Iterator[str]:
    yield "## Spans\n"
    yield "A span also has the attributes that its parents were opened with.\n"
    rows = ((f"`{name}`", span.meaning, _codes(span.attributes)) for name, span in sorted(semconv.SPANS.items()))
    yield from _table(("span", "meaning", "attributes"), rows)
    yield "\nIf an exception ends a span, the span's `error` is the exception's type. `OTelSink` writes it as the"
    yield "attribute `error.type` and as the event `exception`.\n"
    yield "Events:\n"
    rows = ((f"`{event.name}`", event.meaning, _codes(event.attributes)) for event in semconv.EVENTS.values())
    yield from _table(("event", "meaning", "attributes"), rows)


def _metrics() -> Iterator[str]:
    yield "\n## Metrics\n"
    yield "Prometheus adds `_bucket`, `_sum` and `_count` to the name of a histogram.\n"
    rows = (
        (f"`{name}`", m.kind, f"`{m.unit}`", _codes(m.attributes), m.description, f"`{prometheus_name(m)}`")
        for name, m in sorted(semconv.METRICS.items())
    )
    yield from _table(("metric", "kind", "unit", "labels", "meaning", "in Prometheus"), rows)
    yield "\nThe seconds of each span are a histogram, too. So are those of your own spans, for the first 64 of"
    yield "your span names. `vgen.request` has none, because only some requests get a span; `vgen.request.e2e` has all"
    yield "requests.\n"
    durations = [semconv.duration(name) for name in sorted(semconv.SPANS) if name not in semconv.SELECTED]
    rows = ((f"`{m.name}`", _codes(m.attributes), f"`{prometheus_name(m)}`") for m in durations)
    yield from _table(("metric", "labels", "in Prometheus"), rows)
    yield "\nUpper bounds of the buckets, by unit:\n"
    bounds = {"`s`": semconv.SECONDS, "`By`": semconv.BYTES, "others": semconv.COUNTS}
    yield from _table(("unit", "bounds"), ((unit, _numbers(numbers)) for unit, numbers in bounds.items()))


def _attributes() -> Iterator[str]:
    columns = ("attribute", "type", "meaning")
    yield "\n## Attributes\n"
    yield "In the names of a weight sync, a *receiver* is a server that gets the weights. A *bucket* is one of the"
    yield "buffers in which they travel. The *plan* says how the engine loads them: by a record of its loader, or by"
    yield "its own reload. The *audit* checks that every element sent reaches a parameter, and lists as *narrowed* what"
    yield "the engine keeps in a narrower dtype than the trainer. [weight_sync.md](weight_sync.md) explains these."
    yield "*Arrival* of a request is when vLLM's front end receives it, and the *core* is vLLM's engine core, which"
    yield "schedules and runs it ([engine.md](engine.md)).\n"
    yield from _table(columns, ((f"`{name}`", a.type, a.meaning) for name, a in sorted(semconv.ATTRIBUTES.items())))
    yield "\n## Resource\n"
    yield "Attributes of the whole process, set by the providers of `vgen.profiling.sinks.otel_sdk`.\n"
    yield from _table(columns, ((f"`{a.name}`", a.type, a.meaning) for a in semconv.RESOURCE.values()))


def _other_names() -> Iterator[str]:
    yield "\n## OpenTelemetry's generative AI conventions\n"
    yield "The OpenTelemetry sink also emits these metrics, with buckets as the conventions ask for. There are two"
    yield "conventions, and you choose with `OTelSink(conventions=...)`; with both, it emits both. `gen_ai.server.*` is"
    yield "only for engines in this process, `gen_ai.client.*` only for engines in other processes. The status of both"
    yield "conventions is development: they may change."
    conventions = {
        "`semconv.GEN_AI`, the default: the names that most instrumentations emit today": semconv.GEN_AI,
        "`semconv.GEN_AI_INFERENCE`: the newer names, of release 0.1.0": semconv.GEN_AI_INFERENCE,
    }
    for title, convention in conventions.items():
        yield f"\n{title}:\n"
        columns = ("metric", "kind", "unit", "values of", "where `vgen.engine.kind` is", "labels", "in Prometheus")
        yield from _table(columns, map(_alias, convention.metrics))
    yield "\n## Names for reinforcement learning\n"
    yield "Experimental: `OTelSink(conventions=(semconv.GEN_AI, semconv.RL_EXPERIMENTAL))` gives these spans, and their"
    yield "durations, the names that OpenTelemetry discusses (open-telemetry/semantic-conventions-genai, issue 88).\n"
    renamed = semconv.RL_EXPERIMENTAL.spans.items()
    yield from _table(("span", "becomes"), ((f"`{name}`", f"`{other}`") for name, other in renamed))
    yield ""


def _alias(alias: semconv.Alias) -> tuple[str, ...]:
    metric = alias.instrument
    constant = {name: f"{name}={value}" for name, value in alias.constant.items()}
    labels = _codes(constant.get(name, name) for name in metric.attributes)
    engines, spelling = _codes(alias.engines), f"`{prometheus_name(metric)}`"
    return f"`{metric.name}`", metric.kind, f"`{metric.unit}`", f"`{alias.of}`", engines, labels, spelling


if __name__ == "__main__":
    print(page(), end="")
