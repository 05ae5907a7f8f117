"""Runs made by hand: records exactly as the JSONL sink writes them, with the times a test wants."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from vgen.profiling import recording_format, semconv

BEGIN = 1_790_000_000_000_000_000
"""Nanoseconds. Seconds in these tests count from here."""

_numbers = itertools.count(1)


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


class Writer:
    """One process's file. `ahead` is by how many seconds its clock is."""

    def __init__(
        self, folder: Path, *, host: str = "one", pid: int = 100, rank: int | None = 0, ahead: float = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"vgen-{host}-{pid}-{BEGIN}-0000.jsonl"
        self.rank, self.ahead = rank, ahead
        self.line(recording_format.header_line(recording_format.Header(host, pid, part=0, vgen="0.1.0")))

    def at(self, seconds: float) -> int:
        return BEGIN + ns(seconds + self.ahead)

    def line(self, record: dict[str, Any] | str) -> None:
        text = record if isinstance(record, str) else json.dumps(record, separators=(",", ":")) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def span(
        self,
        name: str,
        start: float,
        end: float | None,
        *,
        under: dict[str, Any] | None = None,
        trace: str | None = None,
        span_id: str | None = None,
        error: str | None = None,
        **attributes: Any,
    ) -> dict[str, Any]:
        """Write a span, or only its start where it has no end; returns the record, for `under`."""
        number = next(_numbers)
        own = dict(under["attributes"]) if under is not None else {}
        if self.rank is not None and name != semconv.STEP:
            own[semconv.RANK] = self.rank
        own |= {key.replace("__", "."): value for key, value in attributes.items()}
        record: dict[str, Any] = {
            "type": "start" if end is None else "end",
            "name": name,
            "trace_id": trace or (under["trace_id"] if under is not None else f"{number:032x}"),
            "span_id": span_id or f"{number:016x}",
            "parent_id": under["span_id"] if under is not None else None,
            "start_unix_ns": self.at(start),
        }
        if end is not None:
            record["end_unix_ns"] = self.at(end)
        record["attributes"] = own
        if error is not None:
            record["error"] = error
        self.line(record)
        return record

    def step(self, number: int, start: float, end: float | None, **more: Any) -> dict[str, Any]:
        return self.span(semconv.STEP, start, end, **more, vgen__step=number)

    def measure(
        self, instrument: Any, values: list[Any], *, at: float = 0, under: dict[str, Any], **attributes: Any
    ) -> None:
        record = {"type": "measurement", "name": instrument.name, "kind": instrument.kind, "unit": instrument.unit}
        own = {**under["attributes"], **{key.replace("__", "."): value for key, value in attributes.items()}}
        ids = {"trace_id": under["trace_id"], "span_id": under["span_id"]}
        self.line({**record, "values": values, "unix_ns": self.at(at), **ids, "attributes": own})

    def generate(
        self,
        step: dict[str, Any],
        start: float,
        end: float,
        requests: list[tuple[float, float]],
        *,
        tokens: list[int] | None = None,
        server: str | None = None,
        spans: int = 0,
    ) -> dict[str, Any]:
        """A call of `generate` with its requests' times; the slowest `spans` of them as spans."""
        tokens = tokens if tokens is not None else [10] * len(requests)
        outer = self.span(semconv.GENERATE, start, end, under=step)
        inner = self.span(semconv.ENGINE_GENERATE, start, end, under=outer)
        where = {semconv.ENGINE_CALL.replace(".", "__"): inner["span_id"]}
        where |= {semconv.SERVER.replace(".", "__"): server} if server is not None else {}
        self.measure(semconv.GENERATED_TOKENS, [sum(tokens)], under=outer)
        self.measure(semconv.COMPLETION_LENGTH, tokens, under=outer)
        self.measure(semconv.REQUEST_START, [begin - start for begin, _ in requests], under=outer, **where)
        self.measure(semconv.REQUEST_E2E, [until - begin for begin, until in requests], under=outer, **where)
        self.measure(
            semconv.REQUEST_TPOT, [(u - b) / t for (b, u), t in zip(requests, tokens, strict=True)], under=outer
        )
        chosen = sorted(range(len(requests)), key=lambda i: requests[i][0] - requests[i][1])[:spans]
        for index in chosen:
            own = {"gen_ai.request.id": f"vgen-{index}", "vgen.prompt.index": index, "vgen.generation.index": 0}
            own |= {"gen_ai.usage.output_tokens": tokens[index], "gen_ai.response.finish_reasons": ["stop"]}
            own |= {"vgen.server": server} if server is not None else {}
            self.span(
                semconv.REQUEST, *requests[index], under=inner, **{k.replace(".", "__"): v for k, v in own.items()}
            )
        return outer


def usual_step(writer: Writer, number: int, start: float, *, longest: float = 1.0, update: float = 1.0) -> float:
    """A step of ten sequences, nine of a second and one of `longest`; returns its end."""
    generated = max(longest, 1.0)
    end = start + generated + 0.1 + update + 0.5
    step = writer.step(number, start, end)
    requests = [(start, start + 1.0)] * 9 + [(start, start + longest)]
    writer.generate(step, start, start + generated, requests, tokens=[100] * 9 + [int(100 * longest)], spans=3)
    at = start + generated
    memory = {"vgen__memory__device__bytes": 1000, "vgen__memory__host__resident": 5000 + number}
    writer.span(semconv.SLEEP, at, at + 0.1, under=step, vgen__sleep__level=1, **memory)
    writer.span("update", at + 0.1, at + 0.1 + update, under=step)
    at += 0.1 + update
    writer.span(semconv.WAKE_UP, at, at + 0.1, under=step, **memory)
    sync = writer.span(semconv.WEIGHT_SYNC, at + 0.1, at + 0.4, under=step, vgen__weight_sync__bytes=3 * 10**8)
    writer.span(semconv.SYNC_TRANSFER, at + 0.1, at + 0.2, under=sync)
    writer.span(semconv.SYNC_LOAD, at + 0.2, at + 0.35, under=sync, vgen__weight_sync__gather=0.05)
    return end


def usual_run(folder: Path, *, steps: int = 4, slow: int | None = 2, longest: float = 8.0) -> Path:
    """A run of steps 1 and on, of which one is slow: one of its sequences is long. A second lies between two steps."""
    writer, at = Writer(folder), 0.0
    for number in range(1, steps + 1):
        at = usual_step(writer, number, at, longest=longest if number == slow else 1.0) + 1.0
    return folder


def words(text: str) -> str:
    """Text with every run of white space as one space, as it is read."""
    return re.sub(r"\s+", " ", text)
