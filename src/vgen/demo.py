"""`vgen demo`: a small RL loop on a real vLLM engine, traced from end to end."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ._output import output_redirected

PROMPTS = ("once upon a time", "the quick brown fox", "to be or not to be", "it was a dark and stormy night")
GROUP_SIZE = 8
"""Completions for each prompt."""
MAX_TOKENS = 48
LEARNING_RATE = 1e-3
WIDTH = 110
"""Columns of the output, unless a terminal says otherwise."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What one training step took and moved."""

    step: int
    generate_seconds: float
    sync_seconds: float
    update_seconds: float
    sleep_seconds: float
    wake_up_seconds: float
    output_tokens: int
    sync_bytes: int
    freed_bytes: int | None
    """Device memory that sleep mode freed; None on a CPU."""
    mean_reward: float

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.generate_seconds

    @property
    def sync_gigabytes_per_second(self) -> float:
        return self.sync_bytes / self.sync_seconds / 1e9


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo prints at its end."""

    engine: str
    steps: list[StepFigures]
    max_logprob_difference: float
    """In nats, between the engine and the trainer after the last sync."""
    trace_file: Path


def run(*, steps: int, out: Path | None, model: Path | None, as_json: bool) -> int:
    """Run the loop and print its results. Returns the exit status: 0, 1 for a run that failed, 2 for a wrong path.

    The run is recorded in the directory `out`, by default a new one in `runs/`, with the engine's output in its
    `engine.log`. `model` is a model directory; without it, a tiny Qwen2 is made in the run's directory.
    """
    directory = Path(out) if out is not None else Path("runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        print(f"vgen demo: cannot write to {directory}: {error.strerror}", file=sys.stderr)
        return 2
    if model is not None and not (model / "config.json").is_file():
        print(f"vgen demo: {model} is not a model directory: it has no config.json", file=sys.stderr)
        return 2
    log = directory / "engine.log"
    try:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # The demo needs nothing from the hub, and a look-up may wait for a network.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with output_redirected(log) as (_, terminal):
            result = _train(steps, directory, model, terminal)
    except Exception as error:
        print(f"vgen demo: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"vgen demo: the engine's output is in {log}", file=sys.stderr)
        return 1
    (print_json if as_json else print_tables)(result)
    return 0


def max_logprob_difference(model: Any, completions: Any) -> float:
    """The largest |Δ|, in nats, between the engine's log-probabilities (at temperature 1) and those of `model`.

    NaN if one of them is NaN.
    """
    import torch

    differences = [torch.zeros(1)]
    with torch.no_grad():
        for completion in completions:
            expected = _token_logprobs(model, completions.prompt_ids[completion.prompt_index], completion.token_ids)
            actual = torch.tensor(completion.logprobs, device=expected.device)
            differences.append((expected - actual).abs().cpu())
    return torch.cat(differences).max().item()  # Python's max may skip a NaN


def print_json(result: DemoResult) -> None:
    """Print the result as one line of JSON."""
    rates = ("tokens_per_second", "sync_gigabytes_per_second")
    totals = {name: sum(getattr(step, name) for step in result.steps) for name in ("output_tokens", "sync_bytes")}
    steps = [asdict(step) | {rate: getattr(step, rate) for rate in rates} for step in result.steps]
    print(json.dumps({**asdict(result), "steps": steps, **totals, "trace_file": str(result.trace_file)}))


def print_tables(result: DemoResult) -> None:
    """Print a table of the steps, the trace of the last one, and the commands that show more."""
    from rich.console import Console
    from rich.table import Table

    from .recordings.export.terminal import waterfall
    from .recordings.reader.selection import select

    console, last = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH), result.steps[-1].step
    table = Table(title=f"{result.engine}: seconds of each step", title_justify="left", box=None, padding=(0, 2, 0, 0))
    headings = ["step", "generate", "sync", "update", "sleep", "wake", "tokens/s", "sync MB", "GB/s", "reward"]
    freed = any(step.freed_bytes is not None for step in result.steps)
    for heading in [*headings, "freed GiB"] if freed else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for one in result.steps:
        seconds = (one.generate_seconds, one.sync_seconds, one.update_seconds, one.sleep_seconds, one.wake_up_seconds)
        cells = [str(one.step), *(f"{value:.3f}" for value in seconds), f"{one.tokens_per_second:,.0f}"]
        cells += [f"{one.sync_bytes / 1e6:.2f}", f"{one.sync_gigabytes_per_second:.2f}", f"{one.mean_reward:.3f}"]
        table.add_row(*cells, *([f"{(one.freed_bytes or 0) / 2**30:.2f}"] if freed else []))
    console.print(table)
    trace = select(result.trace_file, last).spans
    console.print(waterfall(trace, width=min(console.width, WIDTH), title=f"\nstep {last}"))
    difference = f"{result.max_logprob_difference:.1e}"
    console.print(f"\nlog-probabilities of engine and trainer after the last sync: max |Δ| = {difference}")
    console.print(f"recorded in {result.trace_file}", soft_wrap=True)
    console.print(f"show the trace again: vgen trace {result.trace_file.parent}", soft_wrap=True)
    console.print(f"show where the time went: vgen report {result.trace_file.parent}", soft_wrap=True)


def _train(steps: int, directory: Path, path: Path | None, terminal: IO[str]) -> DemoResult:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # rich must not replace the standard streams: vLLM's log would keep the replacement and write into the terminal.
    options = dict(console=Console(file=terminal), transient=True, redirect_stdout=False, redirect_stderr=False)
    with Progress(*columns, **options) as progress:  # pyright: ignore[reportArgumentType]
        bar = progress.add_task("starting vLLM", total=None)
        import torch

        from . import ColocateGeneration, ProfilingContext, Sampling
        from .profiling.sinks.jsonl import JsonlSink

        model, tokenizer = _load(path, directory)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)  # pyright: ignore[reportArgumentType]
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        sampling = Sampling(temperature=1.0, max_tokens=MAX_TOKENS)
        figures: list[StepFigures] = []
        sink = JsonlSink(directory)
        with (
            ProfilingContext([sink]) as profiling,
            ColocateGeneration(
                model,
                processing_class=tokenizer,
                enable_sleep_mode=True,
                gpu_memory_utilization=0.3,
                max_model_length=512,
                profiling=profiling,
            ) as generation,
        ):
            progress.update(bar, description="first weights")
            generation.sync_weights(version="step-0")  # the first generation would do it, and step 1 take longer
            for step in range(1, steps + 1):
                progress.reset(bar, total=len(PROMPTS) * GROUP_SIZE, description=f"step {step}/{steps} generate")
                with profiling.step(step) as row:
                    rollouts = generation.generate(
                        PROMPTS, sampling, GROUP_SIZE, on_completion=lambda _: progress.advance(bar)
                    )
                    slept = generation.sleep(level=2)
                    progress.update(bar, description=f"step {step}/{steps} update  ", refresh=True)
                    with profiling.span("reward"):
                        rewards = torch.tensor([_reward(tokenizer, c.token_ids) for c in rollouts], device=device)
                    with profiling.span("update"):
                        _reinforce(model, optimizer, rollouts, rewards)
                    progress.update(bar, description=f"step {step}/{steps} sync    ", refresh=True)
                    # The KV cache wakes up last: it and the sync's buffers do not need memory at the same time.
                    woken = generation.wake_up(["weights"])
                    synced = generation.sync_weights(version=f"step-{step}")
                    cache_woken = generation.wake_up(["kv_cache"])
                seconds = row.summary()
                figures.append(
                    StepFigures(
                        step=step,
                        generate_seconds=seconds["vgen.generate.duration.sum"],
                        sync_seconds=synced.seconds,
                        update_seconds=seconds["update.duration.sum"],
                        sleep_seconds=slept.seconds,
                        wake_up_seconds=woken.seconds + cache_woken.seconds,
                        output_tokens=rollouts.output_tokens,
                        sync_bytes=synced.bytes,
                        freed_bytes=slept.device_bytes,
                        mean_reward=rewards.mean().item(),
                    )
                )
            progress.update(bar, description="comparing log-probabilities")
            difference = max_logprob_difference(model, generation.generate(PROMPTS, sampling, 2))
            return DemoResult(f"vLLM on {generation.engine.device_type}", figures, difference, sink.path)


def _load(path: Path | None, directory: Path) -> tuple[Any, Any]:
    if path is None:
        from .testing import tiny_model

        return tiny_model(directory / "model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto"), AutoTokenizer.from_pretrained(path)


def _reward(tokenizer: Any, token_ids: list[int]) -> float:
    """The share of ASCII letters in the completion: simple enough for the policy to improve within a few steps."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return sum(character.isalpha() and character.isascii() for character in text) / max(len(token_ids), 1)


def _reinforce(model: Any, optimizer: Any, rollouts: Any, rewards: Any) -> None:
    """One REINFORCE step; the baseline is the mean reward of each prompt's completions."""
    groups = rewards.view(-1, GROUP_SIZE)
    advantages = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    optimizer.zero_grad()
    for completion, advantage in zip(rollouts, advantages, strict=True):
        logprobs = _token_logprobs(model, rollouts.prompt_ids[completion.prompt_index], completion.token_ids)
        (-advantage * logprobs.mean() / len(rollouts)).backward()
    optimizer.step()


def _token_logprobs(model: Any, prompt_ids: list[int], token_ids: list[int]) -> Any:
    """The log-probability that `model` gives to each token of a completion; a tensor of shape `(len(token_ids),)`."""
    import torch

    ids = torch.tensor([prompt_ids + token_ids], device=model.device)
    logits = model(ids).logits[0, len(prompt_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt_ids) :, None])[:, 0]
