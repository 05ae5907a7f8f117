"""The page of all names that vgen emits, made from `names.py`, and the check that nothing else is emitted.

python -m vgen.profiling.reference > docs/telemetry.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from . import names
from .records import Instrument

_UNITS = {"s": "seconds", "By": "bytes", "1": ""}

HEAD = """# Telemetry reference

Made from `src/vgen/profiling/names.py` by `python -m vgen.profiling.reference`: change it there.

A name is the same in every sink. What you name yourself, such as `profiling.span("reward")`, stands beside these; the
namespaces `vgen.`, `gen_ai.` and `rl.` are not for names of your own. Nothing here ever holds what a prompt or a
completion says, a key, or the message of an exception.
"""


def page() -> str:
    """The whole of `docs/telemetry.md`."""
    return "\n".join([HEAD, *_spans(), *_metrics(), *_attributes(), *_other_names()])


def prometheus_name(instrument: Instrument) -> str:
    """How OpenTelemetry's Prometheus exporter spells the metric (a histogram has `_bucket`, `_sum`, `_count` of it)."""
    name = re.sub(r"[^a-zA-Z0-9:]+", "_", instrument.name)
    amount, _, time = re.sub(r"{.*?}", "", instrument.unit).partition("/")
    unit = _UNITS.get(amount, amount)
    if time:
        unit = f"{unit}_per_second".lstrip("_")
    if unit and not name.endswith("_" + unit):
        name += "_" + unit
    return name + ("_total" if instrument.kind == "counter" else "")


def unknown(spans: Iterable[Any], measurements: Iterable[Any] = ()) -> list[str]:
    """What a recorded run holds in vgen's namespaces that `names.py` does not list: a sentence each.

    Takes the spans and measurements of a `MemorySink`, or of a `Run` that was read back.

        assert not unknown(sink.spans, sink.measurements)
    """
    found: list[str] = []
    for span in spans:
        found += _strange("span", span.name, span.attributes, names.SPANS)
        for event in span.events:
            found += _strange("event", _get(event, "name"), _get(event, "attributes"), names.EVENTS)
    for measurement in measurements:
        name = _get(measurement, "name") if isinstance(measurement, dict) else measurement.instrument.name
        found += _strange("metric", name, _get(measurement, "attributes"), names.METRICS)
    return list(dict.fromkeys(found))


def _get(record: Any, field: str) -> Any:
    """Of a record as it is in memory, or as it was read back."""
    return record[field] if isinstance(record, dict) else getattr(record, field)  # pyright: ignore[reportUnknownVariableType]


def _strange(kind: str, name: str, attributes: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    if name.startswith(names.RESERVED) and name not in known:
        yield f"{kind} {name} is not in names.py"
    for attribute in attributes:
        if attribute.startswith(names.RESERVED) and attribute not in names.ATTRIBUTES:
            yield f"attribute {attribute} of {kind} {name} is not in names.py"


def _table(*columns: str) -> list[str]:
    return [_row(*columns), _row(*["---"] * len(columns))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _codes(items: Iterable[str]) -> str:
    return ", ".join(f"`{item}`" for item in items)


def _numbers(bounds: Iterable[float]) -> str:
    return ", ".join(f"{bound:g}" if bound < 1e6 else f"{int(bound)}" for bound in bounds)


def _spans() -> Iterator[str]:
    yield "## Spans\n"
    yield "Attributes of a span are inherited by what lies beneath it.\n"
    yield from _table("span", "meaning", "attributes of its own")
    for span in sorted(names.SPANS.values(), key=lambda span: span.name):
        yield _row(f"`{span.name}`", span.meaning, _codes(span.attributes))
    yield "\nA span that ended with an exception has its type in `error.type`, and an event:\n"
    yield from _table("event", "meaning", "attributes")
    for event in names.EVENTS.values():
        yield _row(f"`{event.name}`", event.meaning, _codes(event.attributes))


def _metrics() -> Iterator[str]:
    yield "\n## Metrics\n"
    yield "Prometheus adds `_bucket`, `_sum` and `_count` to the name of a histogram.\n"
    yield from _table("metric", "kind", "unit", "labels", "meaning", "in Prometheus")
    for metric in sorted(names.METRICS.values(), key=lambda metric: metric.name):
        yield _metric(metric)
    yield "\nThe seconds of each span are a histogram as well; spans of your own have one too, for the first 64 names."
    yield "`vgen.request` has none: only some requests become spans. All of them are in `vgen.request.e2e`.\n"
    yield from _table("metric", "labels", "in Prometheus")
    for metric in (names.duration(span.name) for span in sorted(names.SPANS.values(), key=str) if not span.selected):
        yield _row(f"`{metric.name}`", _codes(metric.attributes), f"`{prometheus_name(metric)}`")
    yield "\nUpper bounds of the buckets, by unit:\n"
    yield from _table("unit", "bounds")
    yield _row("`s`", _numbers(names.SECONDS))
    yield _row("`By`", _numbers(names.BYTES))
    yield _row("others", _numbers(names.COUNTS))


def _metric(metric: Instrument) -> str:
    spelling = f"`{prometheus_name(metric)}`"
    return _row(
        f"`{metric.name}`", metric.kind, f"`{metric.unit}`", _codes(metric.attributes), metric.description, spelling
    )


def _attributes() -> Iterator[str]:
    yield "\n## Attributes\n"
    yield from _table("attribute", "type", "meaning")
    for attribute in sorted(names.ATTRIBUTES.values(), key=lambda attribute: attribute.name):
        yield _row(f"`{attribute.name}`", attribute.type, attribute.meaning)
    yield "\n## Resource\n"
    yield "Said once of a whole process, by the providers of `vgen.profiling.sinks.otel_sdk`.\n"
    yield from _table("attribute", "type", "meaning")
    for attribute in names.RESOURCE.values():
        yield _row(f"`{attribute.name}`", attribute.type, attribute.meaning)


def _other_names() -> Iterator[str]:
    yield "\n## OpenTelemetry's generative AI conventions\n"
    yield "What the OpenTelemetry sink emits besides, with the buckets that the conventions ask for. `gen_ai.server.*`"
    yield "only where vgen runs the engine itself, `gen_ai.client.*` only where the engine is another process."
    yield "Their status is development: they may change.\n"
    yield from _table("metric", "unit", "values of", "where `vgen.engine` is", "labels", "in Prometheus")
    for alias in names.GEN_AI.metrics:
        metric = alias.instrument
        fixed = {name: f"{name}={value}" for name, value in alias.constant.items()}
        labels = _codes(fixed.get(name, name) for name in metric.attributes)
        spelling = f"`{prometheus_name(metric)}`"
        yield _row(f"`{metric.name}`", f"`{metric.unit}`", f"`{alias.of}`", _codes(alias.engines), labels, spelling)
    yield "\n## Names for reinforcement learning\n"
    yield "Experimental: `OTelSink(conventions=(names.GEN_AI, names.RL_EXPERIMENTAL))` gives these spans, and their"
    yield "durations, the names that OpenTelemetry discusses (open-telemetry/semantic-conventions-genai, issue 88).\n"
    yield from _table("span", "becomes")
    for own, theirs in names.RL_EXPERIMENTAL.spans.items():
        yield _row(f"`{own}`", f"`{theirs}`")
    yield ""


if __name__ == "__main__":
    print(page(), end="")
