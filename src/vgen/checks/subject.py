"""What a check needs of an engine and its weight sync: four methods, which any project can write for its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from ..errors import CheckError

if TYPE_CHECKING:
    import torch


class Sampled(NamedTuple):
    """One completion: its token ids, and the log-probability of each (natural logarithm) as sampled."""

    token_ids: Sequence[int]
    logprobs: Sequence[float | None]


@runtime_checkable
class WeightSyncSubject(Protocol):
    """An engine together with the weight sync that is to be checked.

    All calls come from one thread, except that a case of updates in flight calls `sync` while another thread is within
    `generate`; it runs only if the subject has an attribute `concurrent` that is true. Further attributes that a
    subject may have: `dtype`, in which the engine computes, if it is not that of the trainer's model (`"bfloat16"`);
    `quantization`, if the engine keeps its weights or its KV cache in 8 bits; a method `close`, called at the end.
    """

    def sync(self, model: torch.nn.Module) -> object:
        """Bring the weights of `model`, as they are now, into the engine. An exception means: refused."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float
    ) -> Sequence[tuple[Sequence[int], Sequence[float | None]]]:
        """Sample one completion of exactly `max_tokens` tokens for each prompt, in the order of the prompts.

        Prompts are token ids. The end-of-sequence token does not end a completion (`ignore_eos`), and all tokens may be
        sampled (`top_p=1`, no `top_k`, no penalties), greedily if `temperature` is 0. Returns the token ids and their
        log-probabilities, in nats, at temperature 1.
        """
        ...


class SleepingSubject(WeightSyncSubject, Protocol):
    """A subject whose engine can sleep. Without these two methods the cases of sleep mode are left out."""

    def sleep(self, level: int) -> object:
        """Put the engine to sleep: level 1 keeps the weights in host memory, level 2 discards them."""

    def wake_up(self) -> object:
        """Wake the engine up, the memory of its weights and its KV cache included."""


SubjectFactory: TypeAlias = "Callable[[torch.nn.Module, str], WeightSyncSubject]"
"""Makes a subject whose engine fits a model, which was saved, with a tokenizer, in the folder given as the second
argument. The engine need not have the model's weights yet."""


def generate(subject: WeightSyncSubject, prompts: Sequence[Sequence[int]], tokens: int, temperature: float) -> Any:
    """The subject's completions, each a `Sampled`. Raises `CheckError` if they are not what was asked for."""
    asked = f"generate({len(prompts)} prompts, max_tokens={tokens}, temperature={temperature:g})"
    answer = subject.generate([list(prompt) for prompt in prompts], max_tokens=tokens, temperature=temperature)
    try:
        completions = [Sampled(list(map(int, ids)), list(logprobs)) for ids, logprobs in answer]
    except (TypeError, ValueError) as error:
        raise CheckError(
            f"{asked} returned {type(answer).__name__}, which is not a list of (token ids, log-probabilities)"
        ) from error
    if len(completions) != len(prompts):
        raise CheckError(f"{asked} returned {len(completions)} completions: return one for each prompt, in order")
    for index, completion in enumerate(completions):
        counts = len(completion.token_ids), len(completion.logprobs)
        if counts != (tokens, tokens):
            raise CheckError(
                f"{asked} returned {counts[0]} token ids and {counts[1]} log-probabilities for prompt {index}: return "
                f"{tokens} of each; set ignore_eos, and ask the engine for the sampled token's log-probability"
            )
    return completions


def as_float(logprob: float | None) -> float:
    """A log-probability as a number: None, and nothing else, stands for NaN."""
    return math.nan if logprob is None else float(logprob)
