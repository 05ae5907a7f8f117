"""Why a step took as long as it did: sentences, the most important first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from .figure_types import RunFigures, StepFigures, median
from .phases import ENGINE, REST

_LONGEST = "its longest completion has {this_step:,.0f} tokens, the others' {other_steps:,.0f}"
_QUEUED = "requests waited {this_step:.2f} s in the queue (median), the others' {other_steps:.2f} s"
ReadFigure: TypeAlias = "Callable[[StepFigures], float | None]"

NOTABLE_SHARE = 0.1
"""A cause that makes up less than this share of a step's extra time is not mentioned."""
NOTABLE_RATIO = 1.2
"""A figure is a cause only if it is this many times that of the other steps."""
STANDS_OUT = 1.5
"""A step stands out if it took this many times the median of the others."""
WAITED_SECONDS = 0.05
"""A shorter extra wait for the trainer's model is not mentioned."""


def explain(run: RunFigures, number: int) -> list[str]:
    """Sentences on the step with this number, compared with the median of the run's other steps.

    Empty if there is no such step. If several ranks recorded the step, the sentences describe the
    slowest rank.
    """
    steps = [step for step in run.steps if step.step == number]
    if not steps:
        return []
    step = max(steps, key=lambda one: one.seconds)
    others = [other for other in run.steps if other is not step and other.ended]
    took = f"step {number} took {step.seconds:.2f} s"
    if not others:
        return [f"{took}; there is no other step to compare it with", *_shares(step)]
    usual = statistics.median(other.seconds for other in others)
    if step.seconds < NOTABLE_RATIO * usual:
        comparison = "less than the others did" if NOTABLE_RATIO * step.seconds < usual else "about as the others did"
        return [f"{took}, {comparison} (median {usual:.2f} s)", *_shares(step)]
    ratio = f"{step.seconds / usual:.1f} times" if usual else "not"
    sentences = [f"{took}, {ratio} the median of the other steps ({usual:.2f} s)", *_causes(run, step, others, usual)]
    if step.error is not None:
        sentences.append(f"it ended with {step.error}")
    if not step.ended:
        sentences.append("it never ended: the record stops in the middle of it")
    return sentences


def slowest_step(run: RunFigures) -> int | None:
    """The number of a step that stands out; None if there is none, or there are fewer than three steps."""
    if len(run.steps) < 3:
        return None
    slowest = max(run.steps, key=lambda step: step.seconds)
    usual = statistics.median(step.seconds for step in run.steps if step is not slowest)
    return slowest.step if slowest.seconds >= STANDS_OUT * usual else None


def _causes(run: RunFigures, step: StepFigures, others: Sequence[StepFigures], usual: float) -> Iterator[str]:
    """The phases that took longer than usual, the worst first, each with its own causes."""
    medians = {
        name: statistics.median(other.phases.get(name, 0.0) for other in others)
        for name in {name for one in (step, *others) for name in one.phases}
    }
    excess = {name: step.phases.get(name, 0.0) - usual_seconds for name, usual_seconds in medians.items()}
    extra_seconds = max(step.seconds - usual, sum(seconds for seconds in excess.values() if seconds > 0))
    for name in sorted(excess, key=lambda name: -excess[name]):
        if excess[name] < NOTABLE_SHARE * extra_seconds:
            break
        figures = f"{step.phases[name]:.2f} s against {medians[name]:.2f} s"
        share = 100 * excess[name] / extra_seconds
        yield f"{_phase(name)} took {excess[name]:.2f} s more ({figures}), {share:.0f} % of the difference"
        if name == "generate":
            yield from _generation(step, others, excess[name])
        elif name == "sync":
            yield from _sync(run, step.step)


def _phase(name: str) -> str:
    if name == REST:
        return "what lies in no span (the rest of the step)"
    return name if name in ENGINE else f"the span `{name}`"


def _shares(step: StepFigures) -> list[str]:
    """Sentences on the three longest phases of a step, for a step that is not slow or has nothing to compare with."""
    sentences: list[str] = []
    step_seconds = step.seconds or 1.0
    for name, seconds in sorted(step.phases.items(), key=lambda item: -item[1])[:3]:
        if seconds >= NOTABLE_SHARE * step_seconds:
            sentences.append(f"{_phase(name)} took {seconds:.2f} s, {100 * seconds / step_seconds:.0f} % of it")
    if step.tail is not None and step.tail.long:
        sentences.append(step.tail.sentence)
    return sentences


def _percentile(name: str, percentile: str) -> ReadFigure:
    return lambda step: getattr(step.requests.get(name), percentile, None)


def _token_milliseconds(step: StepFigures) -> float | None:
    times = step.requests.get("time_per_output_token")
    return None if times is None else 1e3 * times.p50


def _generation(step: StepFigures, others: Sequence[StepFigures], excess: float) -> Iterator[str]:
    """Why generation took `excess` seconds longer."""
    usual_tail = median(one.tail.seconds if one.tail else None for one in others)
    if step.tail is not None and step.tail.long and step.tail.seconds - (usual_tail or 0.0) >= 0.3 * excess:
        yield step.tail.sentence
        if step.slowest:
            yield _longest_request(step)
    comparisons: tuple[tuple[ReadFigure, float, str], ...] = (
        (
            lambda one: one.output_tokens,
            1,
            "it generated {times} the tokens ({this_step:,.0f} against {other_steps:,.0f})",
        ),
        (_percentile("output_tokens", "max"), 1, _LONGEST),
        (
            _token_milliseconds,
            0,
            "a token took {times} as long (median {this_step:.1f} ms against {other_steps:.1f} ms)",
        ),
        (_percentile("queue", "p50"), NOTABLE_SHARE * excess, _QUEUED),
        (
            lambda one: one.generate_calls,
            1,
            "it called generate {this_step:.0f} times, the others {other_steps:.0f} times",
        ),
    )
    for read, minimum_difference, sentence in comparisons:
        this_step, other_steps = read(step), median(map(read, others))
        if this_step is None or other_steps is None:
            continue
        if this_step >= NOTABLE_RATIO * other_steps and this_step - other_steps >= minimum_difference:
            times = f"{this_step / other_steps:.1f} times" if other_steps else "more than"
            yield sentence.format(times=times, this_step=this_step, other_steps=other_steps)
    preempted = sum(slow.preemptions or 0 for slow in step.slowest)
    if preempted:
        yield f"the slowest requests were preempted {preempted} times: the KV cache was too small for them all"


def _longest_request(step: StepFigures) -> str:
    slow = step.slowest[0]
    which = f"prompt {slow.prompt}, completion {slow.generation}" if slow.prompt is not None else "one request"
    server = f" on {slow.server}" if slow.server else ""
    tokens = f" for {slow.output_tokens} tokens" if slow.output_tokens is not None else ""
    usual = f"; the median request took {step.requests['e2e'].p50:.2f} s" if "e2e" in step.requests else ""
    return f"the longest, {which}{server}, ran {slow.seconds:.2f} s{tokens}{usual}"


def _sync(run: RunFigures, number: int) -> Iterator[str]:
    """Why the weight syncs of a step took longer than those of other steps."""
    step_syncs = [sync for sync in run.syncs if sync.step == number]
    others = [sync for sync in run.syncs if sync.step != number and sync.seconds is not None]
    if not step_syncs or not others:
        return
    if len(step_syncs) > 1:
        yield f"it synced {len(step_syncs)} times"
    slowest = max(step_syncs, key=lambda sync: sync.seconds or 0.0)
    excess = {
        name: seconds - statistics.median(other.phases.get(name, 0.0) for other in others)
        for name, seconds in slowest.phases.items()
    }
    if excess:
        phase = max(excess, key=lambda name: excess[name])
        yield f"of the sync, the phase {phase} took {excess[phase]:.2f} s more than usual"
    gather_seconds = slowest.gather_seconds
    median_gather_seconds = statistics.median(other.gather_seconds for other in others)
    longer = gather_seconds > NOTABLE_RATIO * median_gather_seconds
    if longer and gather_seconds - median_gather_seconds > WAITED_SECONDS:
        waited = f"{gather_seconds:.2f} s of it were spent waiting for the trainer's model"
        yield f"{waited} (usually {median_gather_seconds:.2f} s)"
    sent_bytes, median_bytes = slowest.bytes, median(other.bytes for other in others)
    if sent_bytes and median_bytes and sent_bytes > NOTABLE_RATIO * median_bytes:
        yield f"it sent {sent_bytes / median_bytes:.1f} times the bytes"
