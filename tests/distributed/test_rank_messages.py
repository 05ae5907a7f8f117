"""Prompts, terms and completions arrive at another rank as they were."""

from __future__ import annotations

import pytest

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")

from vgen import Completion, Sampling
from vgen.completion_codec import pack, unpack
from vgen.distributed.rank_messages import Message, comparable, decode, encode, pack_prompts, unpack_prompts
from vgen.distributed.ranks import RankPrompt


def test_prompts_arrive_with_their_images_and_the_rank_that_sent_them():
    Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    red, grey = Image.new("RGB", (3, 2), (255, 0, 0)), Image.new("L", (1, 1), 7)
    palette = red.convert("P")
    prompts = [RankPrompt(0, [1, 2], (red, palette)), RankPrompt(2, []), RankPrompt(3, [3], (grey,))]
    received = unpack_prompts(decode(encode(Message("ask", 1, 2, prompts=pack_prompts(prompts)))))
    assert [(p.rank, p.prompt_index, p.token_ids) for p in received] == [(2, 0, [1, 2]), (2, 2, []), (2, 3, [3])]
    assert [[image.mode for image in p.images] for p in received] == [["RGB", "P"], [], ["L"]]
    assert [[image.convert("RGB").tobytes() for image in p.images] for p in received] == [
        [red.tobytes(), red.tobytes()],
        [],
        [grey.convert("RGB").tobytes()],
    ]


def test_many_long_completions_take_eight_bytes_a_token_and_five_percent():
    many = [
        Completion(
            rank=1,
            prompt_index=index,
            generation_index=0,
            token_ids=list(range(2048)),
            logprobs=[-index / 256] * 2048,
            finish_reason="length",
            weight_version="step-1",
            request_id=f"cmpl-{index:032x}-0",
        )
        for index in range(128)
    ]
    raw = encode(Message("data", 1, 0, {"clock_ns": 0, "refused": None}, [], list(map(pack, many))))
    assert len(raw) <= 128 * 2048 * 8 * 1.05
    assert list(map(unpack, decode(raw).completions)) == many


def test_messages_do_not_share_their_defaults():
    Message("alive", 1, 0).data["x"] = 1
    assert Message("alive", 1, 0) == Message("alive", 1, 0, {}, [], [])


def test_terms_compare_by_value():
    one = comparable({"stop": ("a",), "extra": {"b": object()}, "sampling": Sampling(seed=1)})
    assert one == comparable({"stop": ["a"], "extra": {"b": object()}, "sampling": Sampling(seed=1)})
    other = comparable({"stop": ["a"], "extra": {"b": object()}, "sampling": Sampling(seed=2)})
    assert [name for name in one if one[name] != other[name]] == ["sampling"]


def test_terms_may_hold_numbers_of_any_size():
    assert comparable({"seed": 2**70}) != comparable({"seed": 2**70 + 1})
