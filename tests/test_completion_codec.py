"""A completion arrives as it was, in few bytes: between trainer ranks and from a server alike."""

from __future__ import annotations

import math
import struct
import sys
import time
from dataclasses import fields, replace

import pytest

from vgen import Completion, PromptError, RequestTiming

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")

from vgen import completion_codec as codec

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
    rank=2,
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


@pytest.fixture(params=["with torch", "without torch"])
def either_way(request, monkeypatch):
    """Numbers are narrowed by torch where it is loaded, and by the standard library where it is not."""
    if request.param == "with torch":
        pytest.importorskip("torch", reason="torch is not installed")
    else:
        monkeypatch.delitem(sys.modules, "torch", raising=False)


def there_and_back(completion, **changes):
    raw = codec.encode(codec.Done(0, codec.pack(completion), 0))
    return codec.unpack(codec.decode_frame(raw).completion, **changes)


def test_every_field_of_a_completion_arrives():
    assert [f.name for f in fields(Completion) if getattr(FULL, f.name) == f.default] == ["error"]
    assert [f.name for f in fields(RequestTiming) if getattr(TIMING, f.name) is None] == ["time_per_output_token"]
    assert there_and_back(FULL) == FULL
    bare = Completion(prompt_index=0, generation_index=0, token_ids=[])
    assert there_and_back(bare) == bare


def test_why_a_prompt_was_refused_arrives():
    refused = Completion(prompt_index=1, generation_index=0, token_ids=[], error=PromptError(1, "is bad", 7))
    error = there_and_back(refused).error
    assert (type(error), error.index, error.problem, error.limit) == (PromptError, 1, "is bad", 7)


def test_timestamps_become_those_of_the_receivers_clock():
    received = there_and_back(FULL, shift_ns=700)
    assert received.timing == replace(TIMING, queued_ns=TIMING.queued_ns + 700, finished_ns=TIMING.finished_ns + 700)


def test_the_receiver_replaces_what_it_knows_better():
    received = there_and_back(FULL, rank=0, prompt_index=9, server="http://b")
    assert received == replace(FULL, rank=0, prompt_index=9, server="http://b")


@pytest.mark.parametrize("value", [0.1, 1e-300, -1e300, 2.0**-1000])
def test_what_single_precision_would_change_travels_as_doubles(value, either_way):
    assert len(codec.floats([value, -0.5])) == 1 + 2 * 8
    assert codec.to_floats(codec.floats([value, -0.5])) == [value, -0.5]


@pytest.mark.parametrize("values", [[-0.5, -1.0], [-0.5, None], [None, None], [-math.inf, 0.0], []])
def test_what_single_precision_holds_takes_four_bytes(values, either_way):
    assert len(codec.floats(values)) == 1 + 4 * len(values)
    assert codec.to_floats(codec.floats(values)) == values


def test_the_sign_of_zero_is_kept_and_a_nan_becomes_none(either_way):
    (zero,) = codec.to_floats(codec.floats([-0.0]))
    assert math.copysign(1.0, zero) == -1.0
    assert codec.to_floats(codec.floats([math.nan, math.inf, -math.inf])) == [None, math.inf, -math.inf]


def test_a_token_id_that_does_not_fit_is_an_error_and_not_another_token():
    assert codec.to_ints(codec.ints([2**31 - 1, 0])) == [2**31 - 1, 0]
    with pytest.raises(struct.error):
        codec.ints([2**31])


def test_numbers_travel_little_endian(either_way):
    assert codec.ints([1, 256]) == b"\1\0\0\0\0\1\0\0"
    assert codec.floats([-2.0]) == b"f\0\0\0\xc0"


def test_a_long_completion_takes_eight_bytes_a_token_and_five_percent():
    long = Completion(
        prompt_index=0,
        generation_index=0,
        token_ids=list(range(2048)),
        logprobs=[-1 / 256] * 2048,
        finish_reason="length",
        weight_version="step-1",
        request_id=f"cmpl-{0:032x}-0",
        timing=TIMING,
    )
    assert len(codec.encode(codec.pack(long))) <= 2048 * 8 * 1.05
    assert there_and_back(long) == long


def test_a_frame_begins_with_its_length():
    raw = codec.frame_bytes(codec.Alive(3, 7))
    assert int.from_bytes(raw[:4], "big") == len(raw) - 4
    assert codec.decode_frame(raw[4:]) == codec.Alive(3, 7)


def test_a_request_arrives_with_its_defaults():
    batch = codec.BatchRequest("x", [codec.ints([1])], [codec.Wanted(0, 7, None)], {"max_tokens": 2})
    assert codec.decode_request(codec.encode(batch)) == batch


def test_what_was_sent_now_on_the_servers_clock_is_now_on_the_clients():
    from vgen.engine_protocol import Request
    from vgen.engines.client.batch_client import completion_of

    servers_now = 5_000
    timing = replace(TIMING, queued_ns=1_000, finished_ns=servers_now)
    before = time.monotonic_ns()
    done = codec.Done(0, codec.pack(replace(FULL, timing=timing)), servers_now)
    received = completion_of(Request(4, 2, [1], None, rank=1), done, "http://b")
    assert before <= received.timing.finished_ns <= time.monotonic_ns()
    assert received.timing.finished_ns - received.timing.queued_ns == 4_000
    assert (received.key, received.server) == ((1, 4, 2), "http://b")
