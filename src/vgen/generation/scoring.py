"""Log-probabilities of given completions, by a generation of one token after each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ArgumentError, EngineError
from ..types import Completion, Completions, Sampling
from .call_plan import prompt_list
from .prompts import Encoder

SCORING = Sampling(max_tokens=1, logprobs=None, prompt_logprobs=0)
"""Asks for the log-probabilities of the prompt's own tokens."""


def score(
    generate: Callable[..., Completions],
    encoder: Encoder,
    context: int | None,
    prompts: Any,
    completions: Any,
    options: Mapping[str, Any],
) -> list[list[float | None]]:
    """See `Generation.score`. `context` is how many tokens fill the engine's context; None if that stays refused."""
    listed, given = prompt_list(prompts), _token_lists(completions, encoder)
    if len(listed) != len(given):
        raise ArgumentError("completions", f"must be one for each of {len(listed)} prompts, got {len(given)}")
    asked: list[list[Any]] = []
    full: dict[int, list[int]] = {}
    for index, prompt in enumerate(listed):
        ids = [*encoder.unchecked(index, prompt), *given[index]]
        # vLLM takes no prompt that fills its context, as completions do that ran out of room.
        if len(ids) == context and given[index]:
            full[index] = encoder.ids(index, ids)
            ids = full[index][:-1]
        asked.append(ids)  # `generate` checks them
    scored = generate(asked, SCORING, **options)
    found: list[list[float | None]] = []
    for index, completion in enumerate(scored):
        if completion.prompt_logprobs is None and completion.finish_reason == "abort":
            raise EngineError(f"prompt {index} was not scored: its request was aborted; call score() again")
        logprobs = completion.prompt_logprobs or []
        # Counted from the end, because images make the prompt longer.
        found.append(logprobs[len(logprobs) - len(given[index]) + (index in full) :])
        if index in full:
            found[index].append(_last_logprob(generate, full[index], {**options, "images": None}))
    return found


def _token_lists(completions: Any, encoder: Encoder) -> list[list[Any]]:
    ids = [each.token_ids if isinstance(each, Completion) else each for each in completions]
    return [each if type(each) is list else encoder.unchecked(index, each) for index, each in enumerate(ids)]


def _last_logprob(generate: Callable[..., Completions], ids: Sequence[int], options: Mapping[str, Any]) -> float | None:
    """The log-probability of the last token, as that of the next token after the others."""
    sampling = Sampling(max_tokens=1, ignore_eos=True, logprobs=1, extra={"logprob_token_ids": [ids[-1]]})
    (completion,) = generate([ids[:-1]], sampling, **options)
    pairs = dict((completion.top_logprobs or [[]])[0])
    if ids[-1] not in pairs:
        raise EngineError("this engine does not tell the log-probability of a token that fills its context")
    return pairs[ids[-1]]
