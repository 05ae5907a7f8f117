"""Runs cases on one subject, judges them, and says for each failure what usually causes it."""

from __future__ import annotations

import queue
import random
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Generator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from ..errors import CheckError
from .oracle import Measurement, Oracle
from .subject import SubjectFactory, WeightSyncSubject, generate
from .training import train

Status: TypeAlias = Literal["right", "wrong", "refused", "error", "skipped"]

TOKENS = 16
"""Tokens of each completion."""
PROMPT_LENGTHS = (20, 21, 22, 23, 24, 25, 150, 150)
"""Of the prompts. The long ones fill a block of the KV cache, so that their prefix is cached; a CPU has 128 a block."""
TIMEOUT = 300.0


class WrongWeights(AssertionError):
    """The engine's log-probabilities are not those of the trainer's model."""


class _Refused(Exception):
    """The subject's `sync` raised."""


@dataclass(frozen=True, slots=True)
class Case:
    """One situation in which an engine must have the trainer's weights."""

    name: str
    summary: str
    run: Callable[[Bench], object]
    cause: str
    """The mechanism that usually causes a failure."""
    fix: str
    needs: frozenset[str] = frozenset()
    """What of `Session.abilities` the case needs; without it, the case is skipped."""
    own_engine: bool = False
    """Whether it works with an engine of its own alone, so that the session's is not made for it."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one case showed."""

    case: str
    status: Status
    """`right`; `wrong`: the log-probabilities differ; `refused`: the sync raised where it should not; `error`: the case
    could not be run; `skipped`: it does not apply here."""
    detail: str = ""
    measurement: Measurement | None = None
    """The worst of the case; None if nothing was measured."""
    seconds: float = 0.0
    cause: str = ""
    fix: str = ""


@dataclass(slots=True)
class Bench:
    """What a case works with: the trainer's model, the subject, and the judge."""

    session: Session
    model: Any
    subject: Any
    measurements: list[Measurement] = field(default_factory=list[Measurement])
    note: str = ""
    """What the table shows beside a right result."""

    def train(self, which: Callable[[str], bool] = lambda name: True) -> None:
        """Change the weights of the trainer's model, or those whose names `which` accepts."""
        if not train(self.model, self.session.next_seed(), self.session.strength, which):
            raise unittest.SkipTest("the model has no such weight")

    def sync(self) -> Any:
        """Sync the model's weights into the engine."""
        try:
            return self.subject.sync(self.model)
        except CheckError:
            raise
        except Exception as error:
            raise _Refused(f"{type(error).__name__}: {error}") from error

    def generate(self, tokens: int = TOKENS, temperature: float = 1.0, prompts: Sequence[Any] | None = None) -> Any:
        """The engine's completions of the session's prompts, or of others."""
        return generate(self.subject, self.session.prompts if prompts is None else prompts, tokens, temperature)

    def measure(self, completions: Any = None, prompts: Sequence[Any] | None = None) -> Measurement:
        """Compare completions, by default new ones, with the trainer's model as it is now."""
        prompts = self.session.prompts if prompts is None else prompts
        completions = self.generate(prompts=prompts) if completions is None else completions
        return self.oracle.measure(prompts, completions)

    @property
    def oracle(self) -> Oracle:
        """The judge, for the dtype and the quantization that the subject says its engine has."""
        dtype = getattr(self.subject, "dtype", None)
        return Oracle(self.model, dtype, fp8=bool(getattr(self.subject, "quantization", None)))

    def expect_right(self, when: str = "", completions: Any = None, prompts: Sequence[Any] | None = None) -> None:
        """Raise `WrongWeights` unless the engine has the weights that the trainer's model has now."""
        result = self.measure(completions, prompts)
        self.measurements.append(result)
        if not result.right:
            raise WrongWeights(
                f"{when + ': ' if when else ''}log-probabilities differ by {result.ratio:.3g} times the rounding "
                f"noise, where {result.bound:g} is allowed (mean {result.mean:.2g} nats, largest {result.largest:.2g}, "
                f"{result.tokens} tokens)"
            )

    def expect_right_or_refused(self, what: str) -> None:
        """Sync; the engine must then be right, or the sync must raise."""
        try:
            self.sync()
        except _Refused as refusal:
            self.note = f"refused: {refusal}"
        else:
            self.expect_right(f"after {what} was synced without an error")

    @contextmanager
    def weights_kept(self) -> Generator[None]:
        """After the block, the trainer's model has the weights again that it has now."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        try:
            yield
        finally:
            self.model.load_state_dict(before)

    def sleep(self, level: int) -> None:
        self.subject.sleep(level)

    def wake_up(self) -> None:
        self.subject.wake_up()

    @contextmanager
    def fresh(self, model: Any, **options: Any) -> Generator[Bench]:
        """Another engine, for another model; `options` go to the factory."""
        with self.session.open(model, **options) as subject:
            other = Bench(self.session, model, subject, self.measurements)
            yield other
            self.note = other.note or self.note

    def variant(self, seed: int = 0, **fields: Any) -> Any:
        """A tiny model of the same architecture with random weights; `fields` are of its configuration."""
        from .architectures import tiny_model

        return tiny_model(self.model.config.model_type, seed=seed, **fields).to(next(self.model.parameters()))


class _Worker:
    """A thread that makes calls for others, who wait for no longer than they want."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vgen-check", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Any], seconds: float) -> Any:
        """What `function` returns or raises. Raises `queue.Empty` if that takes longer than `seconds`."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((function, answers))
        value, error = answers.get(timeout=seconds)
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the thread. A process that exits while torch still cleans up after one of its threads is aborted."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._calls.get()) is not None:
            function, answers = job
            try:
                answers.put((function(), None))
            except BaseException as error:
                answers.put((None, error))


class Session:
    """One trainer's model, and the subject whose engine must follow it. Use it in a `with` block.

        with Session(model, make_subject) as session:
            for case in SYNC_CASES:
                print(session.run(case))

    The model's weights are changed by the cases. `restore` gives them back.

    Args:
        model: A transformers model for causal language modeling.
        factory: Makes the subject. It is called once, and again by cases that need an engine of their own.
        strength: How much of the weights each training step replaces, up to 1. Less for weights worth keeping.
        abilities: What the subject can do besides, for cases that are not portable.
        timeout: Seconds for each case, and for making the subject.
    """

    def __init__(
        self,
        model: Any,
        factory: SubjectFactory,
        *,
        strength: float = 0.6,
        abilities: Set[str] = frozenset(),
        timeout: float = TIMEOUT,
    ) -> None:
        self.model, self.strength = model, strength
        device = next(model.parameters()).device.type
        self.abilities = frozenset(abilities) | ({"CUDA"} if device == "cuda" else set[str]())
        self._factory, self.timeout, self._seed = factory, timeout, 1000
        self.original = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        self.prompts = prompts_for(model)
        self._worker = _Worker()
        self._subject: Any = None
        self.stuck = False
        """Whether a call of the subject never returned."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next_seed(self) -> int:
        self._seed += 1
        return self._seed

    @contextmanager
    def open(self, model: Any, **options: Any) -> Generator[Any]:
        """A subject from the factory, for a model that is saved in a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="vgen-check-") as folder:
            try:
                save(model, folder)
                subject = self._factory(model, folder, **options)
            except CheckError:
                raise
            except (Exception, SystemExit) as error:
                raise CheckError(f"the engine could not be started: {type(error).__name__}: {error}") from error
            try:
                yield subject
            finally:
                if callable(close := getattr(subject, "close", None)):
                    close()

    def run(self, case: Case) -> Outcome:
        """Run one case. Raises `CheckError` if the subject cannot be made, or does not return in time."""
        start = time.monotonic()
        if not case.own_engine or case.needs - self.abilities:
            self._within(self._start, "making the engine")
        if missing := sorted(case.needs - self.abilities):
            return Outcome(case.name, "skipped", f"needs {', '.join(missing)}")
        bench = Bench(self, self.model, self._subject)
        status, detail = self._within(lambda: _judge(case, bench), f"the case {case.name}")
        worst = max(bench.measurements, key=lambda each: (each.ratio != each.ratio, each.ratio), default=None)
        failed = status in ("wrong", "refused")
        advice = (case.cause, case.fix) if failed else ("", "")
        return Outcome(case.name, status, detail, worst, time.monotonic() - start, *advice)

    def check(self, case: Case) -> None:
        """`run` for a test: raises `AssertionError` unless the case is right, and `unittest.SkipTest` if skipped."""
        outcome = self.run(case)
        if outcome.status == "skipped":
            raise unittest.SkipTest(outcome.detail)
        if outcome.status != "right":
            raise WrongWeights(describe(outcome))

    @property
    def started(self) -> bool:
        """Whether there is a subject, whose weights may have been replaced."""
        return self._subject is not None

    def restore(self) -> None:
        """Give the model its original weights, and sync them. Raises `CheckError` if the subject refuses."""
        import torch

        def put_back() -> None:
            # In the worker's thread, and so after a case that an interrupt has left running.
            with torch.no_grad():
                self.model.load_state_dict(self.original)
            if self._subject is not None:
                bench = Bench(self, self.model, self._subject)
                bench.sync()
                bench.expect_right()

        try:
            self._within(put_back, "putting the weights back", cases=2)
        except CheckError:
            raise
        except Exception as error:
            raise CheckError(f"the weights could not be put back: {error}") from error

    def close(self) -> None:
        """Close the subject, unless a call that never returned holds it."""
        try:
            if self._subject is not None and not self.stuck:
                self._within(self._stop, "close")
        finally:
            if not self.stuck:
                self._worker.close()

    def _start(self) -> None:
        if self._subject is None:
            self._opened = self.open(self.model)
            self._subject = self._opened.__enter__()
            if not isinstance(self._subject, WeightSyncSubject):
                raise CheckError(
                    f"{type(self._subject).__name__} needs the methods sync(model) and generate(prompts, …)"
                )
            if all(callable(getattr(self._subject, name, None)) for name in ("sleep", "wake_up")):
                self.abilities |= {"sleep mode"}
            if getattr(self._subject, "concurrent", False):
                self.abilities |= {"updates in flight"}

    def _stop(self) -> None:
        self._subject = None
        self._opened.__exit__(None, None, None)

    def _within(self, function: Callable[[], Any], what: str, cases: int = 1) -> Any:
        """Call `function` in the worker's thread, which may have `cases` to run until then."""
        if self.stuck:
            raise CheckError(f"{what} is not possible: an earlier call of the subject never returned")
        seconds = self.timeout * cases
        try:
            return self._worker.call(function, seconds)
        except queue.Empty:
            self.stuck = True
            raise CheckError(
                f"{what} did not end within {seconds:g} s: the engine or the weight sync hangs; look at its own "
                "log, or give it more time (timeout)"
            ) from None


def _judge(case: Case, bench: Bench) -> tuple[Status, str]:
    try:
        case.run(bench)
    except unittest.SkipTest as reason:
        return "skipped", str(reason)
    except WrongWeights as error:
        return "wrong", str(error)
    except _Refused as error:
        return "refused", str(error)
    except (Exception, SystemExit) as error:
        return "error", str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"
    return "right", bench.note


def describe(outcome: Outcome) -> str:
    """An outcome that is not right, as text: what was seen, what usually causes it, what to do."""
    advice = f"\n  usual cause: {outcome.cause}\n  what to do: {outcome.fix}" if outcome.cause else ""
    return f"{outcome.case}: {outcome.status}: {outcome.detail}{advice}"


def prompts_for(model: Any) -> list[list[int]]:
    """Random token ids, the same ones each time, which every model knows."""
    dice = random.Random(0)
    vocabulary = min(model.config.get_text_config().vocab_size, 250)
    return [[dice.randrange(3, vocabulary) for _ in range(length)] for length in PROMPT_LENGTHS]


def save(model: Any, folder: str | Path) -> None:
    """Save a model for engines that start from a folder, with a tokenizer of bytes if its vocabulary has room."""
    from ..testing.tiny_models import byte_tokenizer
    from .architectures import VOCABULARY

    model.save_pretrained(folder)
    if model.config.get_text_config().vocab_size >= VOCABULARY:
        byte_tokenizer().save_pretrained(folder)
