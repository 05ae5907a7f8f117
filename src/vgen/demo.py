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
    with _quiet(place / "engine.log") as (stdout, stderr):
        try:
            rows, difference, engine = _loop(steps, place, model, stderr)
        except Exception as error:
            print(f"vgen demo: {type(error).__name__}: {error}\n(the engine's own output: {place}/engine.log)", file=stderr)
            return 1
        (_report_json if as_json else _report)(place, rows, difference, engine, stdout)
    return 0


def _loop(steps: int, place: Path, path: Path | None, stderr: IO[str]) -> tuple[list[StepNumbers], float, str]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=stderr), transient=True) as progress:
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
        with (
            ProfilingContext([JsonlSink(place)]) as profiling,
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
                    progress.update(bar, description=f"step {step}/{steps} update  ")
                    with profiling.span("reward"):
                        rewards = torch.tensor([_reward(tokenizer, c.token_ids) for c in rollouts], device=device)
                    with profiling.span("update"):
                        _reinforce(model, optimizer, rollouts, rewards)
                    progress.update(bar, description=f"step {step}/{steps} sync    ")
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
            difference = max_logprob_difference(model, check)
            return rows, difference, f"vLLM on {generation.engine.device_type}"


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

    worst = 0.0
    with torch.no_grad():
        for completion in completions:
            own = _token_logprobs(model, completions.prompt_ids[completion.prompt_index], completion.token_ids)
            theirs = torch.tensor(completion.logprobs, device=own.device)
            worst = max(worst, (own - theirs).abs().max().item())
    return worst


@contextmanager
def _quiet(log: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    """Send what libraries and the engine print into `log`; yields the real standard output and error."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub, and looking would wait for a network
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with os.fdopen(os.dup(kept[0]), "w") as stdout, os.fdopen(os.dup(kept[1]), "w") as stderr:
        try:
            yield stdout, stderr
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            for descriptor in (*kept, file):
                os.close(descriptor)


def _trace_file(place: Path) -> Path:
    return max(place.glob("vgen-*.jsonl"), key=lambda file: file.stat().st_mtime)


def _report_json(place: Path, rows: list[StepNumbers], difference: float, engine: str, stdout: IO[str]) -> None:
    result = {
        "engine": engine,
        "steps": [
            {**asdict(row), "tokens_per_second": row.tokens_per_second, "sync_gigabytes_per_second": row.sync_rate}
            for row in rows
        ],
        "output_tokens": sum(row.output_tokens for row in rows),
        "sync_bytes": sum(row.sync_bytes for row in rows),
        "max_logprob_difference": difference,
        "trace_file": str(_trace_file(place)),
    }
    print(json.dumps(result), file=stdout)


def _report(place: Path, rows: list[StepNumbers], difference: float, engine: str, stdout: IO[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from .analysis.run import read_run
    from .viewers.terminal import waterfall

    console = Console(file=stdout, highlight=False)
    table = Table(title=f"{engine}: seconds of each step", title_justify="left")
    for heading in ("step", "generate", "sync", "update", "sleep", "wake", "tokens/s", "sync MB", "GB/s", "freed", "reward"):
        table.add_column(heading, justify="right")
    for row in rows:
        freed = "-" if row.freed_bytes is None else f"{row.freed_bytes / 2**30:.2f} GiB"
        seconds = (row.generate_seconds, row.sync_seconds, row.update_seconds, row.sleep_seconds, row.wake_up_seconds)
        table.add_row(
            str(row.step),
            *(f"{value:.3f}" for value in seconds),
            f"{row.tokens_per_second:,.0f}",
            f"{row.sync_bytes / 1e6:.2f}",
            f"{row.sync_rate:.2f}",
            freed,
            f"{row.mean_reward:.3f}",
        )
    console.print(table)
    if rows:
        trace = read_run(place).step(rows[-1].step)
        console.print(waterfall(trace, width=min(console.width, 110), title=f"\nstep {rows[-1].step}"))
    console.print(
        f"\nlog-probabilities of engine and trainer after the last sync: max |Δ| = {difference:.1e}"
        f"\nrecorded in {_trace_file(place)}  (again: vgen trace {place})"
    )
