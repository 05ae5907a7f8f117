"""What the engine did besides generating: weight syncs, sleeps and wake-ups, and work outside of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...profiling import semconv
from ..reader.recording import LARGEST, OPEN, SYNC_PHASE, Recording
from ..reader.requests import NO_STEP
from .figure_types import ReceiverFigures, SleepCycle, SyncFigures
from .phases import KINDS, REST


def syncs(recording: Recording) -> list[SyncFigures]:
    """Each weight sync, in the order of their starts."""
    phases: dict[int, list[int]] = {}
    rows: list[int] = []
    for row in recording.attributes:
        name = recording.span_name(row)
        if name == semconv.WEIGHT_SYNC:
            rows.append(row)
        elif name.startswith(SYNC_PHASE):
            phases.setdefault(recording.parent_id[row], []).append(row)
    rows.sort(key=lambda row: recording.start[row])
    return [_sync(recording, row, phases.get(recording.span_id[row], [])) for row in rows]


def _sync(recording: Recording, row: int, phases: Sequence[int]) -> SyncFigures:
    """The figures of the weight sync recorded in `row`. `phases` are the rows of its phases."""
    attributes, sync_seconds = recording.attributes[row], recording.seconds(row)
    by_phase: dict[str, float] = {}
    receivers: dict[str, ReceiverFigures] = {}
    gather: float = 0
    for phase in phases:
        name, phase_attributes = recording.span_name(phase).removeprefix(SYNC_PHASE), recording.attributes[phase]
        seconds = recording.seconds(phase)
        if seconds is not None:
            by_phase[name] = by_phase.get(name, 0.0) + seconds
        gather += number(phase_attributes.get(semconv.GATHER_SECONDS)) or 0
        median = number(phase_attributes.get(semconv.RECEIVER_MEDIAN))
        slowest = number(phase_attributes.get(semconv.RECEIVER_MAX))
        if median is not None and slowest is not None:
            receivers[name] = ReceiverFigures(median, slowest)
    if sync_seconds is not None and by_phase:
        by_phase[REST] = max(sync_seconds - sum(by_phase.values()), 0.0)
    sent = number(attributes.get(semconv.SYNC_BYTES))
    return SyncFigures(
        step=recording.step_number(row),
        process=recording.processes[recording.process[row]].label,
        version=attributes.get(semconv.WEIGHT_VERSION),
        transport=attributes.get(semconv.TRANSPORT),
        seconds=sync_seconds,
        phases=by_phase,
        gather_seconds=gather,
        bytes=sent,
        gigabytes_per_second=sent / sync_seconds / 1e9 if sent is not None and sync_seconds else None,
        paused_seconds=_paused(recording, row, phases),
        receivers=receivers,
        error=recording.failed.get(row),
    )


def _paused(recording: Recording, row: int, phases: Sequence[int]) -> float | None:
    """Seconds in which the engine could not generate.

    The recorded value; else from the start of the pause phase to the end of resume; else, in process, the whole sync.
    """
    attributes = recording.attributes[row]
    paused = number(attributes.get(semconv.PAUSED_SECONDS))
    ended = {recording.span_name(phase): phase for phase in phases if recording.end[phase] != OPEN}
    if paused is None and {semconv.SYNC_PAUSE, semconv.SYNC_RESUME} <= ended.keys():
        return (recording.end[ended[semconv.SYNC_RESUME]] - recording.start[ended[semconv.SYNC_PAUSE]]) / 1e9
    if paused is None and attributes.get(semconv.ENGINE) == "colocate":
        return recording.seconds(row)
    return paused


def sleep_cycles(recording: Recording) -> list[SleepCycle]:
    """Each sleep with the wake-ups that followed it, process by process."""
    rows = [row for row in recording.attributes if recording.span_name(row) in (semconv.SLEEP, semconv.WAKE_UP)]
    rows.sort(key=lambda row: (recording.process[row], recording.start[row]))
    cycles: list[SleepCycle] = []
    asleep: tuple[int, int] | None = None
    """Number of the process that sleeps, and when its sleep span ended."""
    for row in rows:
        process, attributes = recording.process[row], recording.attributes[row]
        device_bytes, resident, free = (
            number(attributes.get(key)) for key in (semconv.DEVICE_BYTES, semconv.HOST_RESIDENT, semconv.DEVICE_FREE)
        )
        if recording.span_name(row) == semconv.SLEEP:
            step_and_process = recording.step_number(row), recording.processes[process].label
            level, seconds = attributes.get(semconv.SLEEP_LEVEL), recording.seconds(row)
            cycles.append(SleepCycle(*step_and_process, level, seconds, device_bytes, resident, free))
            asleep = process, recording.end[row]
        elif asleep is not None and asleep[0] == process:
            cycle = cycles[-1]
            asleep_seconds = None if asleep[1] == OPEN else (recording.start[row] - asleep[1]) / 1e9
            cycles[-1] = replace(
                cycle,
                wake_seconds=(cycle.wake_seconds or 0.0) + (recording.seconds(row) or 0.0),
                taken_bytes=cycle.taken_bytes if device_bytes is None else (cycle.taken_bytes or 0) + device_bytes,
                host_bytes_awake=resident,
                device_free_bytes_awake=free,
                asleep_seconds=asleep_seconds if cycle.asleep_seconds is None else cycle.asleep_seconds,
            )
    return cycles


def outside_steps(recording: Recording) -> dict[str, float]:
    """Seconds by phase of the engine's work that belongs to no step, such as its start."""
    seconds: dict[str, float] = {}
    phases = [KINDS.get(name) if name != semconv.ENGINE_GENERATE else None for name in recording.names]
    for row, name in enumerate(recording.name):
        phase = phases[name]
        if phase is not None and recording.step[row] == NO_STEP and (took := recording.seconds(row)) is not None:
            seconds[phase] = seconds.get(phase, 0.0) + took
    return seconds


def number(value: Any) -> float | None:
    """`value` if it is a number of a possible size, else None."""
    possible = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return value if possible else None
