"""A tokenizer that the trainer's threads cannot disturb."""

from __future__ import annotations

import logging
import threading

import pytest
from helpers.sources import SmallSource

from vgen import ArgumentError, Generation
from vgen.generation.private_tokenizer import PrivateTokenizer
from vgen.testing import FakeEngine


class Tokenizer:
    """Words by their lengths."""

    bos_token, bos_token_id, chat_template = "<s>", 1, "…"

    def __init__(self):
        self.words = 5

    def __len__(self):
        return self.words

    def __call__(self, text, add_special_tokens=True):
        text.encode()
        ids = [1 if word == "<s>" else len(word) + 1 for word in text.replace("<s>", "<s> ").split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def test_a_rendered_text_gets_one_beginning_of_sequence_token_which_is_said_once(caplog):
    tokenizer = PrivateTokenizer(Tokenizer())
    with caplog.at_level(logging.WARNING):
        assert [tokenizer.encode(0, "<s>ab c") for _ in range(2)] == [[1, 3, 2]] * 2
    assert [record.message.count("beginning-of-sequence") for record in caplog.records] == [1]
    assert tokenizer.encode(0, "ab c") == [1, 3, 2]


def test_the_trainers_tokenizer_is_copied_and_again_when_it_grows():
    original = Tokenizer()
    tokenizer = PrivateTokenizer(original)
    first = tokenizer._own()
    assert first is not original
    assert tokenizer._own() is first
    original.words += 1
    assert tokenizer._own() is not first


@pytest.mark.fault(
    point="arguments and prompts",
    did="Another thread truncates with the trainer's tokenizer",
    happens="No prompt is cut",
    within=60,
)
def test_truncation_in_another_thread_does_not_cut_prompts():
    transformers = pytest.importorskip("transformers")
    from vgen.testing.tiny_models import byte_tokenizer

    original = byte_tokenizer()
    assert isinstance(original, transformers.PreTrainedTokenizerFast)
    original("abcdef", truncation=True, max_length=2)  # as a data loader does: the state stays in the tokenizer
    tokenizer = PrivateTokenizer(original)
    whole = tokenizer.encode(0, "abcdef")
    original.backend_tokenizer.enable_truncation(2)
    assert tokenizer.encode(0, "abcdef") == whole
    assert len(whole) >= 6


def test_text_without_a_tokenizer_names_the_argument():
    with pytest.raises(ArgumentError, match="prompt 3 is text, which needs processing_class"):
        PrivateTokenizer(None).encode(3, "a")
    assert PrivateTokenizer(None).decode([1, 2]) == "[1, 2]"


@pytest.mark.fault(
    point="arguments and prompts",
    did="One prompt holds half of a surrogate pair",
    happens="Its own prompt alone is refused",
    within=20,
)
def test_a_lone_surrogate_loses_its_own_prompt_alone():
    generation = Generation(FakeEngine(), SmallSource(), processing_class=Tokenizer())
    rollouts = generation.generate(["a b", "\ud800", "c"], refused="mark")
    assert [completion.error is not None for completion in rollouts] == [False, True, False]
    assert (rollouts[1].error.index, rollouts[1].error.problem) == (1, "cannot be encoded (UnicodeEncodeError)")


class Stateful:
    """Keeps truncation as its state, as a fast tokenizer does; `during` is called in the middle of each call."""

    during = staticmethod(lambda: None)

    def __init__(self):
        self.most = None

    def __call__(self, text, truncation=False, max_length=None):
        self.most = max_length if truncation else None
        Stateful.during()
        return {"input_ids": [*range(len(text))][: self.most]}


def test_a_call_on_the_trainers_tokenizer_in_the_middle_of_vgens_cuts_no_prompt(monkeypatch):
    original, threads = Stateful(), []
    tokenizer = PrivateTokenizer(original)

    def other_thread():
        if not threads:
            threads.append(threading.Thread(target=original, args=("x",), kwargs={"truncation": True, "max_length": 2}))
            threads[0].start()
            threads[0].join(30)

    monkeypatch.setattr(Stateful, "during", staticmethod(other_thread))
    assert tokenizer.encode(0, "abcdef") == [*range(6)]
    assert original.most == 2


def test_one_thread_at_a_time_uses_the_copy(monkeypatch):
    tokenizer, inside, both = PrivateTokenizer(Stateful()), [], threading.Event()

    def during():
        inside.append(threading.get_ident())
        if len(inside) == 2:
            both.set()
        overlapped.append(both.wait(0.5))  # a second thread comes in only where nothing keeps it out
        inside.pop()

    overlapped: list[bool] = []
    monkeypatch.setattr(Stateful, "during", staticmethod(during))
    threads = [threading.Thread(target=tokenizer.encode, args=(0, "ab")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert overlapped == [False, False]
