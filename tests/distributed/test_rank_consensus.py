"""What raises on one rank raises on all of them, with its class, its fields and a note of the rank."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vgen import Completion, PromptError, ServerError, WeightSyncError
from vgen.distributed.rank_consensus import RankGroup, fail_together, pack_error, unpack_error
from vgen.distributed.ranks import RankPrompt, TensorParallelRanks
from vgen.errors import RankError


class ThreadGroup(RankGroup):
    """A rank of a group whose ranks are threads of this process."""

    def __init__(self, rank: int, size: int, answers: list, barrier: threading.Barrier) -> None:
        super().__init__(alone=True)
        self.rank, self.size, self._answers, self._barrier = rank, size, answers, barrier

    def _exchange(self, answer):
        self._answers[self.rank] = answer
        self._barrier.wait(5)
        everyone = list(self._answers)
        self._barrier.wait(5)
        return everyone


def on_ranks(size: int, function) -> list:
    """What `function(group)` returns or raises on each of `size` ranks."""
    answers, barrier = [None] * size, threading.Barrier(size)

    def run(rank: int):
        try:
            return function(ThreadGroup(rank, size, answers, barrier))
        except BaseException as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize(
    "error",
    [
        ServerError("said no", url="http://a", status=503, retryable=True),
        WeightSyncError("x", phase="load", parameter="w", receiver="r", reason="update_open"),
        PromptError(3, "is empty", 5),
        ValueError("top_p"),
    ],
)
def test_an_error_arrives_as_what_it_is_with_a_note_of_the_rank(error):
    copy = unpack_error(pack_error(error, 2))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__notes__ == ["raised on rank 2"]
    assert vars(copy).items() >= vars(error).items()


def test_an_unknown_error_names_its_rank():
    class Odd(Exception): ...

    copy = unpack_error(pack_error(Odd("hm"), 2))
    assert isinstance(copy, RankError)
    assert str(copy) == "rank 2 raised Odd: hm"
    assert copy.rank == 2


def test_an_error_that_is_passed_on_keeps_the_rank_that_raised_it():
    first = unpack_error(pack_error(ValueError("top_p"), 2))
    assert unpack_error(pack_error(first, 0)).__notes__ == ["raised on rank 2"]


@pytest.mark.fault(
    point="the workers of one engine in several processes",
    did="One rank fails in a phase",
    happens="All ranks raise its error",
    within=20,
)
def test_what_one_rank_raises_all_ranks_raise():
    def work(group):
        with fail_together(group):
            if group.rank == 1:
                raise WeightSyncError("as injected", phase="load", receiver="colocate")
        return "went on"

    zero, one, two = on_ranks(3, work)
    for error in (zero, one, two):
        assert isinstance(error, WeightSyncError)
        assert (error.problem, error.phase, error.receiver) == ("as injected", "load", "colocate")
    assert zero.__notes__ == two.__notes__ == ["raised on rank 1"]
    assert not hasattr(one, "__notes__")


def test_of_several_ranks_errors_all_others_raise_the_first_with_its_rank():
    def work(group):
        with fail_together(group):
            if group.rank:
                raise ValueError(f"of rank {group.rank}")

    zero, one, two = on_ranks(3, work)
    assert (str(zero), zero.raised_on, zero.__notes__) == ("of rank 1", 1, ["raised on rank 1"])
    assert [str(one), str(two)] == ["of rank 1", "of rank 2"]


def test_ranks_that_all_succeed_go_on_together():
    def work(group):
        with fail_together(group):
            pass
        return group.gather(group.rank * 10), group.any(group.rank == 1), group.any(False)

    assert on_ranks(2, work) == [([0, 10], True, False)] * 2


def test_each_rank_that_fails_raises_its_own_error():
    def work(group):
        with fail_together(group):
            raise ValueError(str(group.rank))

    assert [str(error) for error in on_ranks(2, work)] == ["0", "1"]


def test_whatever_fails_in_a_phase_of_a_sync_is_a_weight_sync_error_on_the_other_ranks():
    def work(group):
        with fail_together(group, phase="verify"):
            if group.rank == 1:
                raise RuntimeError("CUDA error")

    zero, one = on_ranks(2, work)
    assert type(one) is RuntimeError
    assert (type(zero), zero.phase, zero.problem) == (WeightSyncError, "verify", "RuntimeError: CUDA error")
    assert zero.__notes__ == ["raised on rank 1"]


@pytest.mark.fault(
    point="the workers of one engine in several processes",
    did="A rank is interrupted",
    happens="It leaves at once",
    within=20,
)
def test_an_interrupted_rank_does_not_wait_for_the_others():
    class Recorder(RankGroup):
        def _exchange(self, answer):
            raise AssertionError("it waits for ranks that may not come")

    with pytest.raises(KeyboardInterrupt), fail_together(Recorder(alone=True)):
        raise KeyboardInterrupt


def test_a_rank_alone_needs_no_torch_distributed():
    alone = RankGroup(alone=True)
    assert alone.gather("x") == ["x"]
    with pytest.raises(ValueError, match="own"), fail_together(alone):
        raise ValueError("own")


def completions(prompts, refuse=()):
    return [
        Completion(
            rank=prompt.rank,
            prompt_index=prompt.prompt_index,
            generation_index=0,
            token_ids=prompt.token_ids,
            error=PromptError(prompt.prompt_index, "is not to its taste") if prompt.token_ids in refuse else None,
        )
        for prompt in prompts
    ]


def test_workers_of_one_engine_ask_it_for_everything_and_keep_their_own():
    def work(group):
        ranks = TensorParallelRanks(group)
        with ranks.call("generate") as call:
            mine = [RankPrompt(0, [group.rank], rank=group.rank), RankPrompt(2, [7], rank=group.rank)]
            prompts = call.gather(mine, {})
            own = call.scatter(call.lead(lambda: completions(prompts)))
            return [p.token_ids for p in prompts], [(c.key, c.token_ids) for c in own], call.refused

    everything = [[0], [7], [1], [7]]
    assert on_ranks(2, work) == [
        (everything, [((0, 0, 0), [0]), ((0, 2, 0), [7])], None),
        (everything, [((1, 0, 0), [1]), ((1, 2, 0), [7])], None),
    ]


@pytest.mark.fault(
    point="the workers of one engine in several processes",
    did="One rank's prompts are refused before the ranks meet",
    happens="All ranks raise",
    within=20,
)
def test_a_prompt_error_before_the_ranks_meet_raises_on_all_workers():
    def work(group):
        with TensorParallelRanks(group).call("generate") as call:
            if group.rank == 1:
                raise PromptError(4, "is empty")
            call.gather([], {})

    zero, one = on_ranks(2, work)
    assert (type(zero), zero.index, zero.problem) == (type(one), one.index, one.problem) == (PromptError, 4, "is empty")
    assert zero.__notes__ == ["raised on rank 1"]


def test_an_error_after_the_ranks_have_met_is_each_workers_own_matter():
    def work(group):
        with TensorParallelRanks(group).call("generate") as call:
            call.gather([], {})
            if group.rank == 1:
                raise ValueError("late")
        return "went on"

    zero, one = on_ranks(2, work)
    assert zero == "went on"
    assert str(one) == "late"


def test_all_workers_learn_that_the_engine_refused_a_prompt_of_one():
    def work(group):
        with TensorParallelRanks(group).call("generate") as call:
            prompts = call.gather([RankPrompt(5, [group.rank], rank=group.rank)], {})
            call.scatter(completions(prompts, refuse=[[1]]))
            return call.refused

    for error in on_ranks(2, work):
        assert (error.index, error.problem, error.__notes__) == (5, "is not to its taste", ["raised on rank 1"])


def test_of_several_refused_prompts_the_first_by_rank_and_place_is_named_on_all_workers():
    def work(group):
        with TensorParallelRanks(group).call("generate") as call:
            places = (6, 2) if group.rank == 0 else (1,)
            prompts = call.gather([RankPrompt(place, [group.rank], rank=group.rank) for place in places], {})
            call.scatter(completions(prompts, refuse=[[0], [1]])[::-1])
            return call.refused

    for error in on_ranks(2, work):
        assert (error.index, error.__notes__) == (2, ["raised on rank 0"])
