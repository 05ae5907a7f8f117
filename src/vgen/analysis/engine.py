"""What the engine did besides generating: syncs by phase, memory by cycle of sleeping and waking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..profiling import names
from .phases import KINDS, REST
from .recording import NO_STEP, OPEN, PHASES, Recording


def syncs(recording: Recording) -> list[dict[str, Any]]:
    """Each weight sync in the order of their starts: seconds by phase, the rest too; bytes; how long nothing ran."""
    phases: dict[int, list[int]] = {}
    found: list[int] = []
    for row in recording.attributes:
        name = recording.names[recording.name[row]]
        if name == names.WEIGHT_SYNC:
            found.append(row)
        elif name.startswith(PHASES):
            phases.setdefault(recording.parent_id[row], []).append(row)
    found.sort(key=lambda row: recording.start[row])
    return [_sync(recording, row, phases.get(recording.span_id[row], [])) for row in found]


def _sync(recording: Recording, row: int, phases: Sequence[int]) -> dict[str, Any]:
    own, seconds = recording.attributes[row], _seconds(recording, row)
    parts: dict[str, float] = {}
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for phase in phases:
        name = recording.names[recording.name[phase]].removeprefix(PHASES)
        lasted = _seconds(recording, phase)
        if lasted is not None:
            parts[name] = parts.get(name, 0.0) + lasted
            starts[name], ends[name] = recording.start[phase], recording.end[phase]
    waited = [recording.attributes[phase].get(names.GATHER_SECONDS) for phase in phases]
    if seconds is not None and parts:
        parts[REST] = max(seconds - sum(parts.values()), 0.0)
    sent = number(own.get(names.SYNC_BYTES))
    receivers = {
        phase: [number(recording.attributes[row].get(one)) for one in (names.RECEIVER_MEDIAN, names.RECEIVER_MAX)]
        for phase, row in zip((_name(recording, row).removeprefix(PHASES) for row in phases), phases, strict=True)
    }
    paused = number(own.get(names.PAUSED_SECONDS))
    if paused is None and {"pause", "resume"} <= parts.keys():
        paused = (ends["resume"] - starts["pause"]) / 1e9
    if paused is None and own.get(names.ENGINE) == "colocate":
        paused = seconds  # an engine in the process generates nothing meanwhile
    return {
        "step": step_number(recording, row),
        "process": recording.processes[recording.process[row]].label,
        "version": own.get(names.WEIGHT_VERSION),
        "transport": own.get(names.TRANSPORT),
        "seconds": seconds,
        "phases": parts,
        "gather_seconds": sum(value for value in map(number, waited) if value is not None),
        "bytes": sent,
        "gigabytes_per_second": sent / seconds / 1e9 if sent is not None and seconds else None,
        "paused_seconds": paused,
        "receivers": {
            phase: {"median": middle, "slowest": worst}
            for phase, (middle, worst) in receivers.items()
            if middle is not None and worst is not None
        },
        "error": recording.failed.get(row),
    }


def cycles(recording: Recording) -> list[dict[str, Any]]:
    """Each sleep with the wake-ups that followed it, process by process: memory given back and taken again."""
    rows = [row for row in recording.attributes if _name(recording, row) in (names.SLEEP, names.WAKE_UP)]
    rows.sort(key=lambda row: (recording.process[row], recording.start[row]))
    found: list[dict[str, Any]] = []
    asleep: dict[int, dict[str, Any]] = {}
    for row in rows:
        process, own = recording.process[row], recording.attributes[row]
        if _name(recording, row) == names.SLEEP:
            cycle = asleep[process] = {
                "step": step_number(recording, row),
                "process": recording.processes[process].label,
                "level": own.get(names.SLEEP_LEVEL),
                "sleep_seconds": _seconds(recording, row),
                "freed_bytes": number(own.get(names.DEVICE_BYTES)),
                "host_bytes_asleep": number(own.get(names.HOST_RESIDENT)),
                "device_free_bytes_asleep": number(own.get(names.DEVICE_FREE)),
                "wake_seconds": None,
                "taken_bytes": None,
                "host_bytes_awake": None,
                "device_free_bytes_awake": None,
                "asleep_seconds": None,
            }
            found.append(cycle)
            cycle["_until"] = recording.end[row]
            continue
        cycle = asleep.get(process)
        if cycle is None:
            continue
        cycle["wake_seconds"] = (cycle["wake_seconds"] or 0.0) + (_seconds(recording, row) or 0.0)
        taken = number(own.get(names.DEVICE_BYTES))
        if taken is not None:
            cycle["taken_bytes"] = (cycle["taken_bytes"] or 0) + taken
        cycle["host_bytes_awake"] = number(own.get(names.HOST_RESIDENT))
        cycle["device_free_bytes_awake"] = number(own.get(names.DEVICE_FREE))
        if cycle["asleep_seconds"] is None and cycle["_until"] != OPEN:
            cycle["asleep_seconds"] = (recording.start[row] - cycle["_until"]) / 1e9
    for cycle in found:
        del cycle["_until"]
    return found


def outside(recording: Recording) -> dict[str, float]:
    """Seconds of the engine's work that lies in no step, such as its start."""
    found: dict[str, float] = {}
    kinds = [KINDS.get(name) if name != names.ENGINE_GENERATE else None for name in recording.names]
    for row, name in enumerate(recording.name):
        kind = kinds[name]
        if kind is not None and recording.step[row] == NO_STEP and recording.end[row] != OPEN:
            found[kind] = found.get(kind, 0.0) + (recording.end[row] - recording.start[row]) / 1e9
    return found


def number(value: Any) -> float | None:
    """`value` where it is a number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def step_number(recording: Recording, row: int) -> int | None:
    """The number of the step that a span says it is of."""
    return None if recording.step[row] == NO_STEP else recording.step[row]


def _name(recording: Recording, row: int) -> str:
    return recording.names[recording.name[row]]


def _seconds(recording: Recording, row: int) -> float | None:
    end = recording.end[row]
    return None if end == OPEN else (end - recording.start[row]) / 1e9
