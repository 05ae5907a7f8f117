"""Prompts that cannot be encoded, or that the engine could not take."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from helpers.operations import calls_made
from helpers.sources import SmallSource

from vgen import Generation, PromptError
from vgen.generation.prompts import Encoder, token_ids
from vgen.testing import FakeEngine

WORDS = {"one": 1, "two": 2, "three": 3}


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [WORDS[word] for word in text.split()]}


@pytest.fixture
def reader(engine: FakeEngine) -> Generation:
    """A generation object that takes text."""
    return Generation(engine, SmallSource(), processing_class=tokenizer)


def test_text_needs_a_tokenizer(generation):
    with pytest.raises(TypeError, match="prompt 1 is text"):
        generation.generate([[1], "two"])


def test_text_and_token_ids_may_be_mixed(reader, engine):
    rollouts = reader.generate(["one two three", [3, 2]])
    assert rollouts.prompt_ids == [[1, 2, 3], [3, 2]]
    assert [request.token_ids for request in engine.requests] == [[1, 2, 3], [3, 2]]


def test_a_processor_encodes_with_its_own_tokenizer(engine):
    processor = SimpleNamespace(tokenizer=tokenizer)
    assert Generation(engine, SmallSource(), processing_class=processor).generate(["two"]).prompt_ids == [[2]]


def test_prompt_errors_hold_no_prompt(generation):
    with pytest.raises(PromptError) as caught:
        generation.generate([[7777777]])
    assert "7777777" not in str(caught.value)
    assert caught.value.limit == 100


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "is empty"),
        ([1] * 1000, r"has 1000 tokens; at most \d+ leave room"),
        ([-1], "outside the vocabulary"),
        ([100], "outside the vocabulary"),
        ([1.5], "must hold integers"),
        ([None], "must hold integers"),
        (memoryview(bytes(4)).cast("B", (2, 2)), "has 2 dimensions"),
        (object(), "must be text or token ids, got object"),
        (b"one", "must be text or token ids, got bytes"),
    ],
)
@pytest.mark.fault(
    point="arguments and prompts",
    did="One prompt is too long",
    happens="It is named; the others are generated",
    within=20,
)
def test_a_prompt_that_the_engine_could_not_take_is_named_and_the_others_are_generated(
    generation, engine, prompt, problem
):
    with pytest.raises(PromptError, match=problem) as caught:
        generation.generate([[1], prompt])
    assert caught.value.index == 1
    assert engine.calls == []
    rollouts = generation.generate([[1], prompt, [2]], refused="mark")
    assert [completion.error is None for completion in rollouts] == [True, False, True]
    assert rollouts.prompt_ids == [[1], [], [2]]


@pytest.fixture(params=["with NumPy", "without NumPy"])
def numpy(request, monkeypatch):
    """Checks of long prompts use NumPy where the trainer has loaded it."""
    module = pytest.importorskip("numpy") if request.param == "with NumPy" else None
    monkeypatch.setitem(sys.modules, "numpy", module)
    return module


def test_a_long_prompt_is_checked_with_and_without_numpy(numpy):
    found = token_ids(0, [*range(90), True], 90)
    assert found == [*range(90), 1]
    assert {type(each) for each in found} == {int}
    for wrong in (90, -1, 2**40):
        with pytest.raises(PromptError, match="outside the vocabulary of 90"):
            token_ids(0, [*range(90), wrong], 90)
    with pytest.raises(PromptError, match="must hold integers"):
        token_ids(0, [*range(90), 1.0], 90)


@pytest.mark.parametrize("length", [1, 64, 65, 512, 900])
def test_a_prompts_checks_are_a_few_calls_of_c_however_long_it_is(length, numpy):
    """benchmarks/arguments.py has their time."""
    encoder = Encoder(FakeEngine(max_model_length=1000), None)

    def calls(prompts: int) -> int:
        return calls_made(lambda: encoder.encode([[1] * length] * prompts, [()] * prompts))

    calls(1)
    assert calls(1) < 30
    assert calls(101) - calls(1) <= 100 * 15


def test_images_of_one_prompt_are_checked_beside_prompts_without(engine):
    """The engine takes no images, so the prompt that has one is refused, wherever it stands."""
    generation = Generation(engine, SmallSource())
    image = object()
    for images, refused in (([[], [image]], 1), ([[image], []], 0)):
        with pytest.raises(PromptError, match="image") as caught:
            generation.generate([[1], [2]], images=images)
        assert caught.value.index == refused
