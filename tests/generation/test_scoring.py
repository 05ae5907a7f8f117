"""Scores of given completions: what is asked of `generate`, and what is taken from its result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.sources import SmallSource

from vgen import ArgumentError, Completion, Completions, EngineError, Generation, PromptError
from vgen.generation.prompts import Encoder
from vgen.generation.scoring import score
from vgen.testing import FakeEngine

CONTEXT = 8


class Scorer:
    """A `generate` whose log-probability of a prompt's token is that token's id, after `images` tokens of images."""

    def __init__(self, images: int = 0, tells: bool = True) -> None:
        self.images, self.tells = images, tells
        self.calls: list[tuple[list[list[int]], dict[str, Any]]] = []

    def __call__(self, prompts: Any, sampling: Any, **options: Any) -> Completions:
        self.calls.append((prompts, options))
        wanted = sampling.extra.get("logprob_token_ids", [])
        top = [[(token, float(token)) for token in wanted if self.tells]]
        sampled = [
            Completion(
                prompt_index=index,
                generation_index=0,
                token_ids=[0],
                prompt_logprobs=[None] * self.images + [float(token) for token in prompt],
                top_logprobs=top,
            )
            for index, prompt in enumerate(prompts)
        ]
        return Completions(prompts, sampled, 1, "0")


def scores(generate: Scorer, prompts: Any, completions: Any, **options: Any) -> list[list[float | None]]:
    encoder = Encoder(FakeEngine(max_model_length=CONTEXT), None)
    return score(generate, encoder, CONTEXT, prompts, completions, options)


def test_each_completion_gets_the_values_of_its_own_tokens():
    generate = Scorer(images=3)
    assert scores(generate, [[1, 2], [3], [4]], [[5], np.array([6, 7]), []], priority=2) == [[5.0], [6.0, 7.0], []]
    assert generate.calls == [([[1, 2, 5], [3, 6, 7], [4]], {"priority": 2})]


def test_a_completion_that_fills_the_context_gets_its_last_value_from_a_call_of_its_own():
    generate = Scorer()
    found = scores(generate, [[1], [1, 2, 3, 4]], [[9], (5, 6, 7, np.int64(8))], images=[None, None], priority=1)
    assert found == [[9.0], [5.0, 6.0, 7.0, 8.0]]
    cut = [1, 2, 3, 4, 5, 6, 7]
    assert [prompts for prompts, _ in generate.calls] == [[[1, 9], cut], [cut]]
    assert generate.calls[1][1] == {"images": None, "priority": 1}  # the images of one prompt are not those of both
    with pytest.raises(EngineError, match="does not tell"):
        scores(Scorer(tells=False), [[1] * 4], [[2] * 4])


def test_a_prompt_alone_that_fills_the_context_is_left_to_generate():
    generate = Scorer()
    assert scores(generate, [[1] * CONTEXT], [[]]) == [[]]
    assert generate.calls == [([[1] * CONTEXT], {})]


def test_what_generate_returned_can_be_scored():
    sampled = [Completion(prompt_index=0, generation_index=0, token_ids=[5, 6])]
    assert scores(Scorer(), [[1, 2]], Completions([[1, 2]], sampled, 1, "0")) == [[5.0, 6.0]]
    with pytest.raises(ArgumentError, match="one for each of 2 prompts, got 1"):
        scores(Scorer(), [[1], [2]], sampled)


@pytest.mark.parametrize("wrong", [[100], [3, 100], [-1], [1.5], ["a"], None, 3, [2] * 3 + [100], [2] * 3 + [1.5]])
def test_the_token_ids_that_are_scored_are_checked(wrong):
    engine = FakeEngine(max_model_length=CONTEXT)
    generation = Generation(engine, SmallSource())
    # The longest fill the context with the second prompt, and their last token goes another way.
    for prompt in ([1], [1] * 4):
        for pair in ((prompt, wrong), (wrong, prompt)):
            with pytest.raises(PromptError) as raised:
                generation.score([prompt, pair[0]], [prompt, pair[1]])
            assert raised.value.index == 1
    generation.score([[1] * 4], [np.array([2, 3])])
    assert [request.token_ids for request in engine.requests] == [[1, 1, 1, 1, 2, 3]]


def test_a_completion_that_was_aborted_before_it_was_scored_is_an_error_and_not_an_empty_score():
    def aborted(prompts: Any, sampling: Any, **options: Any) -> Completions:
        done = [Completion(prompt_index=i, generation_index=0, token_ids=[], finish_reason="abort") for i in (0, 1)]
        return Completions(prompts, done, 1, "0")

    generation = Generation(FakeEngine(), SmallSource())
    encoder = Encoder(generation.engine, None)
    with pytest.raises(EngineError, match="prompt 0 was not scored: its request was aborted"):
        score(aborted, encoder, CONTEXT, [[1], [2]], [[3], [4]], {})
