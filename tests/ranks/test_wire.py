"""What travels between ranks arrives as it was, in few bytes, and errors as what they are."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from vgen import Completion, PromptError, RequestTiming, Sampling, ServerError, WeightSyncError
from vgen.errors import RankError
from vgen.ranks import wire

TIMING = RequestTiming(
    queued_ns=10**15,
    finished_ns=10**15 + 5,
    admission=0.05,
    queue=0.1,
    prefill=0.2,
    decode=1 / 3,
    time_to_first_token=0.3,
    time_per_output_token=None,
    e2e=0.7,
    preemptions=2,
    cached_tokens=16,
)
FULL = Completion(
    prompt_index=3,
    generation_index=1,
    token_ids=[5, 2**31 - 1, 0],
    logprobs=[-0.5, None, -math.inf],
    top_logprobs=[[(5, -0.5), (6, None)], [], [(0, -0.25)]],
    prompt_logprobs=[None, -0.1],
    finish_reason="stop",
    weight_version="b",
    weight_versions=[("a", 0, 2), ("b", 2, 3)],
    request_id="x-1",
    server="http://a",
    timing=TIMING,
    error=None,
)


def there_and_back(completions, later_ns=0):
    raw = wire.pack_completions(completions, 1000).pack()
    return wire.unpack_completions(wire.Message.unpack(raw), 1000 - later_ns)


def test_every_field_of_a_completion_arrives():
    assert [f.name for f in fields(Completion) if getattr(FULL, f.name) == f.default] == ["error"]
    assert [f.name for f in fields(RequestTiming) if getattr(TIMING, f.name) is None] == ["time_per_output_token"]
    bare = Completion(prompt_index=0, generation_index=0, token_ids=[])
    refused = Completion(prompt_index=1, generation_index=0, token_ids=[], error=PromptError(1, "is bad", 7))
    first, second, third = there_and_back([FULL, bare, refused])
    assert first == FULL
    assert second == bare
    assert (third.error.index, third.error.problem, third.error.limit) == (1, "is bad", 7)
    assert there_and_back([]) == []


def test_timestamps_become_ones_of_the_receivers_clock():
    (found,) = there_and_back([FULL], later_ns=700)
    assert found.timing.queued_ns == TIMING.queued_ns + 700
    assert found.timing.e2e == TIMING.e2e


@pytest.mark.parametrize("value", [0.1, 1e-300, -1e300])
def test_what_single_precision_would_change_travels_as_doubles(value):
    (found,) = there_and_back([Completion(prompt_index=0, generation_index=0, token_ids=[1], logprobs=[value])])
    assert found.logprobs == [value]


def test_a_long_reply_takes_eight_bytes_a_token_and_five_percent():
    many = [
        Completion(
            prompt_index=index,
            generation_index=0,
            token_ids=list(range(2048)),
            logprobs=[-index / 256] * 2048,
            finish_reason="length",
            weight_version="step-1",
            request_id=f"cmpl-{index:032x}-0",
            timing=TIMING,
        )
        for index in range(128)
    ]
    assert len(wire.pack_completions(many, 0).pack()) <= 128 * 2048 * 8 * 1.05
    assert there_and_back(many) == many


def test_prompts_and_their_images_arrive():
    Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    red, grey = Image.new("RGB", (3, 2), (255, 0, 0)), Image.new("L", (1, 1), 7)
    palette = red.convert("P")
    asked = [([1, 2], (red, palette)), ([], ()), ([3], (grey,))]
    found = wire.unpack_prompts(wire.Message.unpack(wire.pack_prompts(asked).pack()))
    assert [ids for ids, _ in found] == [[1, 2], [], [3]]
    assert [[image.convert("RGB").tobytes() for image in images] for _, images in found] == [
        [red.tobytes(), red.tobytes()],
        [],
        [grey.convert("RGB").tobytes()],
    ]


@pytest.mark.parametrize(
    "error",
    [
        ServerError("said no", url="http://a", status=503, retryable=True),
        WeightSyncError("x", phase="load", parameter="w", receiver="r"),
        PromptError(3, "is empty", 5),
        ValueError("top_p"),
    ],
)
def test_an_error_arrives_as_what_it_is(error):
    found = wire.unpack_error(wire.pack_error(error), 2)
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.__notes__ == ["raised on rank 2"]
    assert {**vars(found), **vars(error)} == vars(found)


def test_an_unknown_error_names_its_rank():
    class Odd(Exception): ...

    found = wire.unpack_error(wire.pack_error(Odd("hm")), 2)
    assert isinstance(found, RankError)
    assert str(found) == "rank 2 raised Odd: hm"
    assert found.rank == 2


def test_terms_compare_by_value():
    one = wire.terms({"stop": ("a",), "extra": {"b": object()}, "sampling": Sampling(seed=1)})
    assert one == wire.terms({"stop": ["a"], "extra": {"b": object()}, "sampling": Sampling(seed=1)})
    assert one != wire.terms({"stop": ["a"], "extra": {"b": object()}, "sampling": Sampling(seed=2)})
