"""What callers pass is normalized or refused, with an error that names the argument and what to pass instead."""

from __future__ import annotations

import array
import math
from contextlib import suppress
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.sources import SmallSource
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen import ArgumentError, ColocateGeneration, Generation, LoRARequest, PromptError, Sampling, ServerGeneration
from vgen.arguments import checked_call
from vgen.generation.call_plan import CallRequest
from vgen.generation.prompts import token_ids
from vgen.testing import FakeEngine

IDS = [1, 2, 3]


@pytest.fixture
def generation():
    return Generation(FakeEngine(), SmallSource())


@pytest.mark.parametrize(
    ("field", "value", "normal"),
    [
        ("stop", "</answer>", ("</answer>",)),
        ("stop", None, ()),
        ("stop_token_ids", torch.tensor([1, 2]), (1, 2)),
        ("stop_token_ids", 5, (5,)),
        ("max_tokens", np.int64(8), 8),
        ("max_tokens", torch.tensor(8), 8),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", 1, 1.0),
        ("ignore_eos", np.True_, True),
        ("top_k", np.int32(-1), -1),
        ("extra", {"n": 1, "bad_words": ["x"]}, {"bad_words": ["x"]}),
    ],
)
def test_what_means_the_same_is_accepted(field, value, normal):
    found = getattr(Sampling(**{field: value}), field)
    assert found == normal
    assert type(found) is type(normal)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": 8.0}, r"max_tokens must be an integer of at least 1, got 8\.0 \(float\): pass 8"),
        ({"max_tokens": None}, "max_tokens must be an integer"),
        ({"max_tokens": "8"}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"max_tokens": 2**31}, "at most 2147483647"),
        ({"logprobs": 1.0}, "logprobs must be None or an integer"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False"),
        ({"seed": 2**64}, "seed must be .* at most 9223372036854775807"),
        ({"top_p": math.nan}, r"Sampling.top_p must be in \(0, 1\], got nan"),
        ({"min_p": math.inf}, "Sampling.min_p must be"),
        ({"temperature": "hot"}, "temperature must be at least 0"),
        ({"stop": 3}, "stop must be text"),
        ({"stop": ["a", b"b"]}, "stop must be text"),
        ({"stop": ["a", ""]}, "stop must be text that is not empty"),
        ({"stop": "\ud800"}, "half of a surrogate pair"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids must be token ids"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs must be a mapping with one of"),
        ({"structured_outputs": "a+"}, "structured_outputs must be a mapping"),
        ({"extra": {"skip_clone": "x"}}, "'skip_clone', which vgen sets itself"),
        ({"extra": {"_all_stop_token_ids": 1}}, "which vgen sets itself"),
        ({"extra": {"temperature": 0.0}}, r"pass Sampling\(temperature=...\)"),
        ({"extra": {1: 2}}, "names for keys"),
        ({"n": 4}, r"pass num_generations to generate\(\)"),
        ({"extra": {"n": 4}}, r"pass num_generations to generate\(\)"),
        ({"max_new_tokens": 4}, "it is named max_tokens"),
        ({"do_sample": False}, "temperature=0 is greedy"),
        ({"nucleus": 1}, "is not an argument: it takes"),
    ],
)
@pytest.mark.fault(
    point="arguments and prompts",
    did="Values that vLLM takes and then fails to decode",
    happens="`ArgumentError` before they reach the engine",
    within=20,
)
def test_what_would_end_an_engine_is_refused(fields, says):
    with pytest.raises(ArgumentError, match=says):
        Sampling(**fields)


def test_the_error_is_a_value_and_a_type_error():
    for kind in (ValueError, TypeError):
        with pytest.raises(kind):
            Sampling(max_tokens=0)


def test_sampling_params_of_vllm():
    vllm = pytest.importorskip("vllm")
    params = vllm.SamplingParams(temperature=0.3, max_tokens=4, stop="a", bad_words=["x"], seed=3, logprobs=2)
    asked = Sampling(temperature=0.3, max_tokens=4, stop="a", seed=3, logprobs=2, extra={"bad_words": ["x"]})
    assert Sampling.of(params) == asked
    with pytest.raises(ArgumentError, match="pass num_generations"):
        Sampling.of(vllm.SamplingParams(n=2))
    with pytest.raises(ArgumentError, match=r"SamplingParams.max_tokens"):
        Sampling.of(vllm.SamplingParams(max_tokens=None))
    structured = vllm.sampling_params.StructuredOutputsParams(choice=["a", "b"])
    assert Sampling.of(vllm.SamplingParams(structured_outputs=structured)).structured_outputs == {"choice": ["a", "b"]}


def test_sampling_params_are_accepted_by_generate(generation):
    vllm = pytest.importorskip("vllm")
    assert len(generation.generate([IDS], vllm.SamplingParams(max_tokens=3))) == 1


@pytest.mark.parametrize(
    ("sampling", "fix"),
    [
        ({"temperature": 1.0}, r"Sampling\(\*\*them\)"),
        (None, "Sampling"),
        (SimpleNamespace(max_new_tokens=3), "got a SimpleNamespace"),
        (8, "got a int"),
    ],
)
def test_other_samplings_are_refused(generation, sampling, fix):
    with pytest.raises(ArgumentError, match=f"sampling must be a vgen.Sampling.*{fix}"):
        generation.generate([IDS], sampling)


@pytest.mark.parametrize(
    ("prompts", "fix"),
    [
        ("hello", r"pass \[text\]"),
        ({"input_ids": [IDS], "attention_mask": [[1, 1, 1]]}, r"pass its \['input_ids'\], without padding"),
        ({"a": 1}, "pass a list of prompts"),
        (IDS, r"pass \[token_ids\]"),
        (np.array(IDS), r"pass \[token_ids\]"),
        ([np.int64(3)], r"pass \[token_ids\]"),
        (torch.tensor([IDS]), "without padding for each"),
        ([{"role": "user", "content": "hi"}], r"use chat\(\)"),
        ([[{"role": "user", "content": "hi"}]], r"use chat\(\)"),
        (None, "got None"),
        (3, "got 3"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(generation, prompts, fix):
    for call in (generation.generate, generation.stream, lambda each: generation.score(each, [IDS])):
        with pytest.raises(ArgumentError, match=f"prompts must.*{fix}"):
            call(prompts)
    assert len(generation.generate([IDS])) == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda g: g.generate([IDS], n=2), r"generate\(n=\) is not an argument: pass num_generations"),
        (lambda g: g.generate([IDS], max_new_tokens=2), "it is named max_tokens"),
        (lambda g: g.generate([IDS], temperature=1.0), r"pass sampling=Sampling\(...\)"),
        (lambda g: g.generate(), "generate needs prompts"),
        (lambda g: g.generate([IDS], Sampling(), 1, None), "takes no further argument by its place"),
        (lambda g: g.generate([IDS], prompts=[IDS]), "got prompts twice"),
        (lambda g: g.generate([IDS], num_generations=0), "num_generations must be an integer of at least 1"),
        (lambda g: g.generate([IDS], num_generations=2.0), "pass 2"),
        (lambda g: g.generate([IDS], priority="high"), "priority must be an integer"),
        (lambda g: g.generate([IDS], refused="skip"), "refused must be 'raise' or 'mark'"),
        (lambda g: g.generate([IDS], images=[]), "a list for each of 1 prompts, got 0"),
        (lambda g: g.generate([IDS], images=["a.png"]), r"\[\[image\], ...\]"),
        (lambda g: g.generate([IDS], lora_request="x"), "lora_request must be a vgen.LoRARequest"),
        (lambda g: g.generate([IDS], Sampling(stop_token_ids=[3, 100])), "outside the vocabulary of 100"),
        (lambda g: g.stream([IDS], n=2), "pass num_generations"),
        (lambda g: g.chat([{"role": "user", "content": "x"}]), "processing_class"),
        (lambda g: g.score([IDS], [IDS, IDS]), "completions must be one for each of 1 prompts"),
        (lambda g: g.sync_weights(1.5), "version must be"),
        (lambda g: g.sync_weights(""), "version must be"),
        (lambda g: g.sync_weights("a\nb"), "version must be"),
        (lambda g: g.sync_weights(verify="yes"), "verify must be one of"),
        (lambda g: Generation(FakeEngine(), SmallSource(), tokenizer=1), "it is named processing_class"),
        (lambda g: Generation(FakeEngine(), SmallSource(), profiling=[]), r"pass ProfilingContext\(\[sink\]\)"),
        (lambda g: ColocateGeneration("folder", object()), "takes no further argument by its place"),
        (lambda g: ColocateGeneration("folder", max_model_len=3), "it is named max_model_length"),
        (lambda g: ColocateGeneration("folder", max_model_length=3.5), "max_model_length must be an integer"),
        (lambda g: ColocateGeneration("folder", gpu_memory_utilization=90), r"must be in \(0, 1\]"),
        (lambda g: ServerGeneration(None, base_urls="::1"), r"an address such as"),
        (lambda g: ServerGeneration(None, base_urls="http://::1:8000"), r"http://\[::1\]:8000"),
        (lambda g: ServerGeneration(None, host="::1"), "pass base_urls"),
    ],
)
def test_wrong_arguments_are_named_with_the_right_call(generation, call, says):
    with pytest.raises(ArgumentError, match=says):
        call(generation)
    assert len(generation.generate([IDS])) == 1


def test_a_version_may_be_a_number_and_profiling_none():
    generation = Generation(FakeEngine(), SmallSource(), profiling=None, weight_version=np.int64(7))
    assert generation.weight_version == "7"
    assert generation.sync_weights(3).version == "3"


def test_vllms_adapter_requests_are_accepted():
    vllm = pytest.importorskip("vllm.lora.request")
    request = CallRequest.of([IDS], Sampling(), 1, lora_request=vllm.LoRARequest("a", 1, "/some/where"))
    assert request.lora_request == LoRARequest(lora_name="a", lora_path="/some/where")


@pytest.mark.parametrize(
    "prompt",
    [
        *(IDS, tuple(IDS), np.array(IDS), np.array(IDS, np.uint8), torch.tensor(IDS), array.array("q", IDS)),
        *(map(int, IDS), [np.int64(1), 2, torch.tensor(3)], range(1, 4)),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_token_ids_of_every_kind_become_ints(prompt):
    found = token_ids(0, list(prompt) if isinstance(prompt, map) else prompt, 100)
    assert found == IDS
    assert {type(each) for each in found} == {int}
    assert found is not prompt


@pytest.mark.parametrize("length", [3, 300], ids=["short", "long"])
@pytest.mark.parametrize("odd", [True, np.int64(1), np.int8(1), torch.tensor(1), IntEnum("Token", "ONE").ONE])
def test_integers_of_another_kind_among_ints_become_ints(length, odd):
    """Lists of different lengths are checked in different ways."""
    for odds in ([odd], [True, np.int32(3)]):  # `marshal` writes these two in ten bytes, as it does two ints
        found = token_ids(0, [2] * length + odds, 100)
        assert found == [2] * length + [int(each) for each in odds]
        assert {type(each) for each in found} == {int}


@pytest.mark.parametrize("length", [0, 3, 300], ids=["alone", "short", "long"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *(
            (each, "must hold integers")
            for each in (1.0, np.float32(1), np.True_, "a", None, [1], torch.tensor([1, 2]))
        ),
        *((each, "outside the vocabulary of 100") for each in (100, -1, 2**31, 2**32, -(2**40), np.int64(100))),
    ],
    ids=str,
)
def test_one_wrong_token_id_is_found_wherever_it_stands(length, wrong, says):
    for prompt in ([2] * length + [wrong], [wrong] + [2] * length, [2, wrong] + [2] * length):
        with pytest.raises(PromptError, match=says):
            token_ids(0, prompt, 100)


@pytest.mark.parametrize(
    "prompt",
    [
        *(None, [1.0, 2.5], np.array([1.5]), torch.tensor([1.0]), torch.tensor([IDS]), ["a"], b"abc", {1: 2}, 3),
        *([None], [-1], [2**40], [[1]]),
    ],
)
def test_what_is_no_token_ids_is_a_prompt_error_and_the_others_are_generated(generation, prompt):
    rollouts = generation.generate([IDS, prompt, IDS], refused="mark")
    assert [completion.error is not None for completion in rollouts] == [False, True, False]
    assert isinstance(rollouts[1].error, PromptError)
    with pytest.raises(PromptError) as raised:
        generation.generate([IDS, prompt])
    assert raised.value.index == 1


@checked_call
def takes(one, *, two=2):
    return one, two


def test_a_checked_call_passes_right_arguments_on():
    assert takes(1) == (1, 2)
    assert takes(one=1, two=3) == (1, 3)
    with pytest.raises(ArgumentError, match="takes needs one"):
        takes(two=3)


def test_a_type_error_of_the_function_itself_goes_on_as_it_is():
    error = TypeError("its own")

    @checked_call
    def fails(one):
        raise error

    with pytest.raises(TypeError) as raised:
        fails(1)
    assert raised.value is error
    with pytest.raises(ArgumentError, match="got one twice") as refused:
        fails(1, one=1)
    assert refused.value.__suppress_context__  # Python's own words say less


VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.binary(max_size=3)),
    st.lists(st.integers(-5, 500), max_size=4),
    st.lists(st.floats(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.integers(0, 200).map(np.int64),
    st.floats(0, 1).map(np.float32),
    st.lists(st.integers(0, 90), max_size=3).map(torch.tensor),
    st.just(object()),
)
FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "logprobs", "prompt_logprobs",
    "structured_outputs", "extra", "n", "what",
)  # fmt: skip


@settings(derandomize=True, max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_any_sampling_is_right_or_refused(fields):
    with suppress(ArgumentError):
        sampling = Sampling(**fields)
        assert type(sampling.max_tokens) is int
        assert {type(each) for each in sampling.stop} <= {str}
        assert math.isfinite(sampling.temperature)


ENGINE = Generation(FakeEngine(), SmallSource())
OPTIONS = ("num_generations", "images", "lora_request", "priority", "refused", "sampling", "what")


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.one_of(VALUES, st.lists(VALUES, max_size=3)), st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=2))
@pytest.mark.fault(
    point="arguments and prompts",
    did="Arguments are drawn at random",
    happens="A typed error or success; the next call succeeds",
    within=60,
)
def test_any_call_succeeds_or_raises_a_typed_error_and_the_next_succeeds(prompts, options):
    if isinstance(options.get("num_generations"), int) and options["num_generations"] > 50:
        options["num_generations"] = 2  # as many as asked for would be made
    with suppress(ArgumentError, PromptError):
        ENGINE.generate(prompts, **options)
    assert ENGINE.generate([IDS])[0].error is None
