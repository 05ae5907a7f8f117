"""The main job, small: a rollout loop of an RL post-training on real vLLM, traced from end to end."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

PROMPTS = ("once upon a time", "the quick brown fox", "to be or not to be", "it was a dark and stormy night")
GROUP = 8
MAX_TOKENS = 48
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What one step took, in seconds, and what it moved."""

    step: int
    generate_seconds: float
    sync_seconds: float
    update_seconds: float
    sleep_seconds: float
    wake_up_seconds: float
    output_tokens: int
    sync_bytes: int
    freed_bytes: int | None
    """Device memory that sleeping gave back; None on a CPU."""
    mean_reward: float

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.generate_seconds

    @property
    def sync_rate(self) -> float:
        """GB/s."""
        return self.sync_bytes / self.sync_seconds / 1e9


def run(*, steps: int, out: Path | None, model: Path | None, as_json: bool) -> int:
    """Run the loop and print its results. Returns the exit status."""
    place = Path(out) if out is not None else Path("runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        print(f"vgen demo: cannot write to {place}: {error.strerror}", file=sys.stderr)
        return 2
    if model is not None and not (model / "config.json").is_file():
        print(f"vgen demo: {model} is not a model directory: it has no config.json", file=sys.stderr)
        return 2
    try:
        with _quiet(place / "engine.log") as terminal:
            result = _loop(steps, place, model, terminal)
    except Exception as error:
        print(f"vgen demo: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"(the engine's own output: {place / 'engine.log'})", file=sys.stderr)
        return 1
    (_report_json if as_json else _report)(result)
    return 0


@dataclass(frozen=True, slots=True)
class _Result:
    engine: str
    rows: list[StepNumbers]
    max_logprob_difference: float
    trace_file: Path


def _loop(steps: int, place: Path, path: Path | None, terminal: IO[str]) -> _Result:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Without rich's stand-ins for the standard streams: vLLM's log would keep one, and write into the terminal.
    ours = dict(console=Console(file=terminal), transient=True, redirect_stdout=False, redirect_stderr=False)
    with Progress(*columns, **ours) as progress:  # pyright: ignore[reportArgumentType]
        bar = progress.add_task("starting vLLM", total=None)
        import torch

        from . import ColocateGeneration, ProfilingContext, Sampling
        from .profiling.sinks.jsonl import JsonlSink

        model, tokenizer = _load(path, place)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)  # pyright: ignore[reportArgumentType]
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        sampling = Sampling(temperature=1.0, max_tokens=MAX_TOKENS)
        rows: list[StepNumbers] = []
        sink = JsonlSink(place)
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
            for step in range(1, steps + 1):
                progress.reset(bar, total=len(PROMPTS) * GROUP, description=f"step {step}/{steps} generate")
                with profiling.step(step) as row:
                    rollouts = generation.generate(
                        PROMPTS, sampling, GROUP, on_completion=lambda _: progress.advance(bar)
                    )
                    slept = generation.sleep(level=2)
                    progress.update(bar, description=f"step {step}/{steps} update  ", refresh=True)
                    with profiling.span("reward"):
                        rewards = torch.tensor([_reward(tokenizer, c.token_ids) for c in rollouts], device=device)
                    with profiling.span("update"):
                        _reinforce(model, optimizer, rollouts, rewards)
                    progress.update(bar, description=f"step {step}/{steps} sync    ", refresh=True)
                    woke = generation.wake_up(["weights"])
                    synced = generation.sync_weights(version=f"step-{step}")
                    woke_cache = generation.wake_up(["kv_cache"])
                seconds = row.summary()
                rows.append(
                    StepNumbers(
                        step=step,
                        generate_seconds=seconds["vgen.generate.duration.sum"],
                        sync_seconds=synced.seconds,
                        update_seconds=seconds["update.duration.sum"],
                        sleep_seconds=slept.seconds,
                        wake_up_seconds=woke.seconds + woke_cache.seconds,
                        output_tokens=rollouts.output_tokens,
                        sync_bytes=synced.bytes,
                        freed_bytes=slept.device_bytes,
                        mean_reward=rewards.mean().item(),
                    )
                )
            progress.update(bar, description="comparing log-probabilities")
            check = generation.generate(PROMPTS, sampling, 2)
            engine = f"vLLM on {generation.engine.device_type}"
            return _Result(engine, rows, max_logprob_difference(model, check), sink.path)


def _load(path: Path | None, place: Path) -> tuple[Any, Any]:
    if path is None:
        from .testing import tiny_model

        return tiny_model(place / "model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto"), AutoTokenizer.from_pretrained(path)


def _reward(tokenizer: Any, token_ids: list[int]) -> float:
    """The share of letters in what was written: simple enough to see the policy move."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return sum(character.isalpha() and character.isascii() for character in text) / max(len(token_ids), 1)


def _reinforce(model: Any, optimizer: Any, rollouts: Any, rewards: Any) -> None:
    """One REINFORCE step, each group's mean reward as the baseline."""
    advantages = (rewards.view(-1, GROUP) - rewards.view(-1, GROUP).mean(dim=1, keepdim=True)).flatten()
    optimizer.zero_grad()
    for completion, advantage in zip(rollouts, advantages, strict=True):
        logprobs = _token_logprobs(model, rollouts.prompt_ids[completion.prompt_index], completion.token_ids)
        (-advantage * logprobs.mean() / len(rollouts)).backward()
    optimizer.step()


def _token_logprobs(model: Any, prompt_ids: list[int], token_ids: list[int]) -> Any:
    """The model's own log-probabilities of a completion, given its prompt."""
    import torch

    ids = torch.tensor([prompt_ids + token_ids], device=model.device)
    logits = model(ids).logits[0, len(prompt_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt_ids) :, None])[:, 0]


def max_logprob_difference(model: Any, completions: Any) -> float:
    """The largest |Δ| between the engine's log-probabilities (at temperature 1) and the model's own."""
    import torch

    differences = [torch.zeros(1)]
    with torch.no_grad():
        for completion in completions:
            own = _token_logprobs(model, completions.prompt_ids[completion.prompt_index], completion.token_ids)
            theirs = torch.tensor(completion.logprobs, device=own.device)
            differences.append((own - theirs).abs().cpu())
    return torch.cat(differences).max().item()  # nan where one is, which Python's own max would hide


@contextmanager
def _quiet(log: Path) -> Iterator[IO[str]]:
    """Send what libraries and the engine print into `log`; yields the real standard error."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub, and looking would wait for a network
    kept = os.dup(1), os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def redirect(stdout: int, stderr: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)

    redirect(file, file)
    try:
        with os.fdopen(os.dup(kept[1]), "w") as terminal:
            yield terminal
    finally:
        redirect(*kept)
        for descriptor in (*kept, file):
            os.close(descriptor)


def _report_json(result: _Result) -> None:
    steps = [
        {**asdict(row), "tokens_per_second": row.tokens_per_second, "sync_gigabytes_per_second": row.sync_rate}
        for row in result.rows
    ]
    whole = {
        "engine": result.engine,
        "steps": steps,
        "output_tokens": sum(row.output_tokens for row in result.rows),
        "sync_bytes": sum(row.sync_bytes for row in result.rows),
        "max_logprob_difference": result.max_logprob_difference,
        "trace_file": str(result.trace_file),
    }
    print(json.dumps(whole))


def _report(result: _Result) -> None:
    from rich.console import Console
    from rich.table import Table

    from .analysis.run import read_run
    from .viewers.terminal import waterfall

    console, rows = Console(highlight=False, width=None if sys.stdout.isatty() else 110), result.rows
    table = Table(title=f"{result.engine}: seconds of each step", title_justify="left", box=None, padding=(0, 2, 0, 0))
    headings = ["step", "generate", "sync", "update", "sleep", "wake", "tokens/s", "sync MB", "GB/s", "reward"]
    freed = any(row.freed_bytes is not None for row in rows)
    for heading in [*headings, "freed GiB"] if freed else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        seconds = (row.generate_seconds, row.sync_seconds, row.update_seconds, row.sleep_seconds, row.wake_up_seconds)
        cells = [str(row.step), *(f"{value:.3f}" for value in seconds), f"{row.tokens_per_second:,.0f}"]
        cells += [f"{row.sync_bytes / 1e6:.2f}", f"{row.sync_rate:.2f}", f"{row.mean_reward:.3f}"]
        table.add_row(*cells, *([f"{(row.freed_bytes or 0) / 2**30:.2f}"] if freed else []))
    console.print(table)
    trace = read_run(result.trace_file).step(rows[-1].step)
    console.print(waterfall(trace, width=min(console.width, 110), title=f"\nstep {rows[-1].step}"))
    difference = f"{result.max_logprob_difference:.1e}"
    console.print(f"\nlog-probabilities of engine and trainer after the last sync: max |Δ| = {difference}")
    console.print(f"recorded in {result.trace_file}", soft_wrap=True)
    console.print(f"show it again: vgen trace {result.trace_file.parent}", soft_wrap=True)
    console.print(f"where the time went: vgen report {result.trace_file.parent}", soft_wrap=True)
