"""A tokenizer that the trainer's threads cannot disturb."""

from __future__ import annotations

import logging

import pytest

from vgen import ArgumentError
from vgen.generation.private_tokenizer import PrivateTokenizer


class Tokenizer:
    """Words by their lengths. It counts how many threads are in it."""

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
