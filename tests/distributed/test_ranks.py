"""Ranks that are the workers of one engine: each asks for all prompts, and gets its own completions."""

from __future__ import annotations

import threading

import pytest

from vgen import PromptError
from vgen.distributed.ranks import RankPrompt, SingleRank, TensorParallelRanks
from vgen.types import Completion


class Group:
    """Two threads as the ranks of a process group: `gather` is their meeting."""

    def __init__(self, rank, meeting, answers):
        self.rank, self._meeting, self._answers = rank, meeting, answers

    def gather(self, value):
        self._answers[self.rank] = value
        self._meeting.wait(10)
        answers = list(self._answers)
        self._meeting.wait(10)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def report(self, error):
        self._answers[self.rank] = error
        self._meeting.wait(10)
        self._meeting.wait(10)


def on_two_ranks(work):
    """What `work(ranks, rank)` returned or raised on each of two ranks."""
    meeting, answers, results = threading.Barrier(2), [None, None], [None, None]

    def run(rank):
        try:
            results[rank] = work(TensorParallelRanks(Group(rank, meeting, answers)), rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def completion(prompt: RankPrompt, error=None) -> Completion:
    return Completion(
        prompt_index=prompt.prompt_index, generation_index=0, token_ids=[1], rank=prompt.rank, error=error
    )


def test_each_rank_asks_for_all_prompts_and_gets_its_own_under_its_callers_numbers():
    def work(ranks, rank):
        with ranks.call("generate") as call:
            own = [RankPrompt(index, [rank, index], rank=rank) for index in range(1 + 2 * rank)]
            gathered = call.gather(own, {})
            sampled = call.lead(lambda: [completion(prompt) for prompt in gathered])
            return [prompt.token_ids for prompt in gathered], [found.key for found in call.scatter(sampled)]

    everything = [[0, 0], [1, 0], [1, 1], [1, 2]]
    assert on_two_ranks(work) == [(everything, [(0, 0, 0)]), (everything, [(1, 0, 0), (1, 1, 0), (1, 2, 0)])]


def test_an_error_before_the_gathering_is_raised_on_both_ranks():
    def work(ranks, rank):
        with ranks.call("generate") as call:
            if rank == 1:
                raise PromptError(0, "is empty")
            call.gather([], {})

    first, second = on_two_ranks(work)
    assert str(first) == str(second) == "prompt 0 is empty"


def test_a_prompt_that_the_engine_refused_is_known_to_every_rank_with_the_rank_that_asked():
    def work(ranks, rank):
        with ranks.call("generate") as call:
            gathered = call.gather([RankPrompt(4, [1], rank=rank)], {})
            refused = [completion(each, PromptError(4, "is too long") if each.rank else None) for each in gathered]
            call.scatter(refused)
            return str(call.refused), call.refused.__notes__

    assert on_two_ranks(work) == [("prompt 4 is too long", ["raised on rank 1"])] * 2


def test_one_rank_alone_passes_everything_through():
    rank, prompts = SingleRank(), [RankPrompt(0, [1])]
    with rank.call("generate") as call:
        assert call.gather(prompts, {}) == prompts
        assert call.lead(lambda: [1]) == [1]
        assert call.scatter([1]) == [1]
        call.alive()


@pytest.mark.parametrize("leading", [SingleRank.leading, TensorParallelRanks.leading])
def test_every_such_rank_has_an_engine(leading):
    assert leading


def test_a_prompt_is_rank_0s_unless_another_rank_is_named():
    assert (RankPrompt(3, [1]).rank, list(RankPrompt(3, [1]).images)) == (0, [])
