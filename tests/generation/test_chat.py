"""Conversations as prompts, through a chat template. Templates of real models are in tests/real."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.sources import SmallSource

from vgen import ArgumentError, Generation, PromptError
from vgen.generation.chat import Chat

jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed: it comes with the engine")


class Tokenizer:
    """One token for each character. Its template refuses the word `no`, and is wrong for the word `broken`."""

    def __init__(self) -> None:
        self.settings: list[dict] = []

    def apply_chat_template(self, messages, **settings):
        self.settings.append(settings)
        text = " ".join(message["content"] for message in messages)
        if text == "no":
            raise jinja2.TemplateError("roles must alternate")
        if text == "broken":
            raise jinja2.TemplateSyntaxError("unexpected end of template", 1)
        return text

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) % 100 for letter in text]}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def tokenizer():
    return Tokenizer()


@pytest.fixture
def generation(engine, tokenizer):
    return Generation(engine, SmallSource(), processing_class=tokenizer)


def test_conversations_are_rendered_with_the_callers_settings(generation, tokenizer):
    rollouts = generation.chat(
        [said("ab"), said("c")], num_generations=2, tools=[print], chat_template_kwargs={"enable_thinking": False}
    )
    assert rollouts.prompt_ids == [[97, 98], [99]]
    assert len(rollouts) == 4
    expected = {"add_generation_prompt": True, "tools": [print], "enable_thinking": False, "tokenize": False}
    assert tokenizer.settings == [expected, expected]


@pytest.mark.fault(
    point="a call of `generate`",
    did="The chat template refuses a conversation",
    happens="It is named; the others are generated",
    within=20,
)
def test_a_conversation_that_the_template_refuses_is_raised_or_marked(generation):
    with pytest.raises(PromptError, match="prompt 1 was refused by the chat template: roles must alternate"):
        generation.chat([said("a"), said("no")])
    rollouts = generation.chat([said("a"), said("no")], refused="mark")
    assert [completion.error is None for completion in rollouts] == [True, False]


def test_a_template_that_is_wrong_itself_is_no_conversations_fault(generation):
    with pytest.raises(jinja2.TemplateSyntaxError):
        generation.chat([said("broken")], refused="mark")


def test_a_template_of_the_call_serves_a_tokenizer_that_has_none_and_without_either_it_is_refused():
    class Bare(Tokenizer):
        chat_template = None

    def encode(index, text):
        return [len(text)]

    bare = Bare()
    assert Chat(bare, {"chat_template": "{{ messages }}"}, encode).render(0, said("hello")) == ([5], [])
    assert bare.settings[0]["chat_template"] == "{{ messages }}"
    for without in (bare, SimpleNamespace(tokenizer=bare)):
        with pytest.raises(ArgumentError, match="chat_template"):
            Chat(without, {}, encode)


@pytest.mark.parametrize("wrong", ["text", 3, ["text"], [said("a")]])
def test_what_is_no_conversation_is_named_and_the_others_are_rendered(wrong):
    chat = Chat(Tokenizer(), {}, lambda index, text: [len(text)])
    prompts, _ = chat.render_all([said("hello"), wrong])
    assert prompts[0] == [5]
    assert isinstance(prompts[1], PromptError)
    assert prompts[1].index == 1
