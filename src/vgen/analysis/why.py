"""Why a step took as long as it did: sentences, the weightiest first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .phases import ENGINE, REST

NOTABLE = 0.1
"""What makes up less than this part of a step's excess is not talked of."""
UNLIKE = 1.2
"""By how much a figure must differ to be called a reason."""


def explain(summary: dict[str, Any], number: int) -> list[str]:
    """Sentences on the step of that number, as against the median of the run's other steps; empty if there is none."""
    steps = [step for step in summary["steps"] if step["step"] == number]
    if not steps:
        return []
    step = max(steps, key=lambda one: one["seconds"])
    others = [other for other in summary["steps"] if other is not step and other["ended"]]
    if not others:
        return [f"step {number} took {step['seconds']:.2f} s; there is no other step to compare it with", *_alone(step)]
    usual = statistics.median(other["seconds"] for other in others)
    excess = step["seconds"] - usual
    if step["seconds"] < UNLIKE * usual:
        than = "less than the others did" if UNLIKE * step["seconds"] < usual else "about as the others did"
        said = f"step {number} took {step['seconds']:.2f} s, {than} (median {usual:.2f} s)"
        return [said, *_alone(step)]
    ratio = f"{step['seconds'] / usual:.1f} times" if usual else "not"
    found = [f"step {number} took {step['seconds']:.2f} s, {ratio} the median of the other steps ({usual:.2f} s)"]
    phases = {name for one in (step, *others) for name in one["phases"]}
    middle = {name: _median(others, lambda one, name=name: one["phases"].get(name, 0.0)) or 0.0 for name in phases}
    over = {name: step["phases"].get(name, 0.0) - middle[name] for name in phases}
    whole = max(excess, sum(seconds for seconds in over.values() if seconds > 0))
    for name in sorted(over, key=lambda name: -over[name]):
        if over[name] < NOTABLE * whole:
            break
        figures = f"{step['phases'][name]:.2f} s against {middle[name]:.2f} s"
        share = 100 * over[name] / whole
        found.append(f"{_called(name)} took {over[name]:.2f} s more ({figures}), {share:.0f} % of the difference")
        if name == "generate":
            found += _generation(step, others, over[name])
        elif name == "sync":
            found += _sync(summary, number)
    if step["error"] is not None:
        found.append(f"it ended with {step['error']}")
    if not step["ended"]:
        found.append("it never ended: the record stops in the middle of it")
    return found


def slowest_step(summary: dict[str, Any]) -> int | None:
    """The number of a step that is well slower than the others, where there is one."""
    steps = summary["steps"]
    if len(steps) < 3:
        return None
    worst = max(steps, key=lambda step: step["seconds"])
    usual = statistics.median(step["seconds"] for step in steps if step is not worst)
    return worst["step"] if worst["seconds"] >= 1.5 * usual else None


def _called(name: str) -> str:
    if name == REST:
        return "what lies in no span (the rest of the step)"
    return name if name in ENGINE else f"the span `{name}`"


def _alone(step: dict[str, Any]) -> list[str]:
    found = []
    whole = step["seconds"] or 1.0
    for name, seconds in sorted(step["phases"].items(), key=lambda item: -item[1])[:3]:
        if seconds >= NOTABLE * whole:
            found.append(f"{_called(name)} took {seconds:.2f} s, {100 * seconds / whole:.0f} % of it")
    if step["tail"] is not None and step["tail"]["long"]:
        found.append(step["tail"]["sentence"])
    return found


def _generation(step: dict[str, Any], others: Sequence[dict[str, Any]], excess: float) -> list[str]:
    found: list[str] = []
    own, usual = step["tail"], _median(others, lambda one: one["tail"]["seconds"] if one["tail"] else None)
    if own is not None and own["long"] and own["seconds"] - (usual or 0.0) >= 0.3 * excess:
        found.append(own["sentence"])
        if step["slowest"]:
            found.append(_longest(step))
    waited = NOTABLE * excess
    for what, text, unit, least in (
        (_tokens, "it generated {times} the tokens ({own:,.0f} against {usual:,.0f})", 1.0, 1.0),
        (_longest_text, "its longest completion has {own:,.0f} tokens, the others' {usual:,.0f}", 1.0, 1.0),
        (_per_token, "a token took {times} as long (median {own:.1f} ms against {usual:.1f} ms)", 1e3, 0.0),
        (_queue, "requests waited {own:.2f} s in the queue (median), the others' {usual:.2f} s", 1.0, waited),
        (_calls, "it called generate {own:.0f} times, the others {usual:.0f} times", 1.0, 1.0),
    ):
        mine, theirs = what(step), _median(others, what)
        if mine is None or theirs is None or mine < UNLIKE * theirs or (mine - theirs) < least:
            continue
        times = f"{mine / theirs:.1f} times" if theirs else "more than"
        found.append(text.format(times=times, own=mine * unit, usual=theirs * unit))
    preempted = sum(slow["preemptions"] or 0 for slow in step["slowest"])
    if preempted:
        found.append(f"the slowest requests were preempted {preempted} times: the KV cache was too small for them all")
    return found


def _tokens(step: dict[str, Any]) -> float | None:
    return step["output_tokens"]


def _longest_text(step: dict[str, Any]) -> float | None:
    return _of(step, "output_tokens", "max")


def _per_token(step: dict[str, Any]) -> float | None:
    return _of(step, "time_per_output_token", "p50")


def _queue(step: dict[str, Any]) -> float | None:
    return _of(step, "queue", "p50")


def _calls(step: dict[str, Any]) -> float | None:
    return step["generate_calls"]


def _longest(step: dict[str, Any]) -> str:
    slow = step["slowest"][0]
    which = f"prompt {slow['prompt']}, completion {slow['generation']}" if slow["prompt"] is not None else "one request"
    tokens = f" for {slow['output_tokens']} tokens" if slow["output_tokens"] is not None else ""
    middle = _of(step, "e2e", "p50")
    usual = f"; the median request took {middle:.2f} s" if middle is not None else ""
    server = f" on {slow['server']}" if slow["server"] else ""
    return f"the longest, {which}{server}, ran {slow['seconds']:.2f} s{tokens}{usual}"


def _sync(summary: dict[str, Any], number: int) -> list[str]:
    own = [sync for sync in summary["syncs"] if sync["step"] == number]
    others = [sync for sync in summary["syncs"] if sync["step"] != number and sync["seconds"] is not None]
    if not own or not others:
        return []
    found: list[str] = []
    if len(own) > 1:
        found.append(f"it synced {len(own)} times")
    worst = max(own, key=lambda sync: sync["seconds"] or 0.0)
    over = {
        name: seconds - (_median(others, lambda one, name=name: one["phases"].get(name, 0.0)) or 0.0)
        for name, seconds in worst["phases"].items()
    }
    if over:
        phase = max(over, key=lambda name: over[name])
        found.append(f"of the sync, the phase {phase} took {over[phase]:.2f} s more than usual")
    waited, usual = worst["gather_seconds"], _median(others, lambda one: one["gather_seconds"]) or 0.0
    if waited > UNLIKE * usual and waited - usual > 0.05:
        found.append(f"{waited:.2f} s of it were spent waiting for the trainer's model (usually {usual:.2f} s)")
    sent, usually = worst["bytes"], _median(others, lambda one: one["bytes"])
    if sent and usually and sent > UNLIKE * usually:
        found.append(f"it sent {sent / usually:.1f} times the bytes")
    return found


def _of(step: dict[str, Any], distribution: str, figure: str) -> float | None:
    return step["requests"].get(distribution, {}).get(figure)


def _median(steps: Sequence[dict[str, Any]], what: Callable[[dict[str, Any]], float | None]) -> float | None:
    known = [value for value in map(what, steps) if value is not None]
    return statistics.median(known) if known else None
