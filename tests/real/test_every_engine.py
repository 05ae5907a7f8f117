"""What all engines have in common: one suite, run on each real engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vgen import ColocateGeneration, LoRARequest, PromptError, Sampling, ServerConnection, ServerGeneration
from vgen.engine_protocol import EngineState
from vgen.generation.call_plan import request_seed
from vgen.testing import tiny_model

pytest.importorskip("peft", reason="PEFT is not installed: pip install 'vgen[peft]'")

ENGINES = ["colocate", "server"]
"""Each names a fixture `every_<name>` that yields a `Subject`."""


@dataclass
class Subject:
    """A generation object whose engine accepts LoRA adapters up to rank 8, two at a time."""

    model: Any
    tokenizer: Any
    generation: Any

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def well(self) -> bool:
        """Whether the engine is awake and its log-probabilities are the model's."""
        (completion,) = self.generation.generate([[1, 2, 3]], Sampling(max_tokens=8, ignore_eos=True))
        return self.generation.state is EngineState.AWAKE and agrees(self.model, [1, 2, 3], completion)


def own_logprobs(model: Any, prompt: list[int], token_ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


def agrees(model: Any, prompt: list[int], completion: Any) -> bool:
    return completion.logprobs == pytest.approx(own_logprobs(model, prompt, completion.token_ids), abs=1e-4)


@pytest.fixture(scope="module")
def every_colocate(tmp_path_factory) -> Iterator[Subject]:
    model, tokenizer = tiny_model(tmp_path_factory.mktemp("model"))
    more = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2, "max_logprobs": 20}
    generation = ColocateGeneration(
        model,
        processing_class=tokenizer,
        max_model_length=256,
        engine_kwargs={"kv_cache_memory_bytes": 32 << 20, "scheduling_policy": "priority", **more},
    )
    yield Subject(model, tokenizer, generation)
    generation.close()


@pytest.fixture(scope="module")
def every_server(server) -> Iterator[Subject]:
    keys = {"api_key": server.api_key, "control_key": server.control_key, "processing_class": server.tokenizer}
    with ServerGeneration(
        server.model, base_urls=[server.base_url], connection=ServerConnection(timeout=120.0), **keys
    ) as generation:
        generation.sync_weights()  # other tests have changed the model
        yield Subject(server.model, server.tokenizer, generation)


@pytest.fixture(params=ENGINES)
def subject(request) -> Subject:
    found: Subject = request.getfixturevalue(f"every_{request.param}")
    found.generation.sync_weights()
    return found


# --- chat ------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no role x') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{{ mood }}{% if add_generation_prompt %}a:{% endif %}"
)
GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)


def test_chat_renders_messages_tools_and_more_through_the_template(subject):
    def weather(city: str) -> str:
        """
        Tells the weather.

        Args:
            city: where
        """
        return city

    schema = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    conversations = [[{"role": "user", "content": "hi"}], [{"role": "system", "content": "s"}]]
    rollouts = subject.generation.chat(
        conversations,
        GREEDY,
        2,
        tools=[schema, weather],
        chat_template=TEMPLATE,
        chat_template_kwargs={"mood": "!"},
    )
    texts = ["u:hi;[f][weather]!a:", "s:s;[f][weather]!a:"]
    assert [subject.text(ids) for ids in rollouts.prompt_ids] == texts
    plain = subject.generation.generate(texts, GREEDY, 2)
    assert [c.token_ids for c in rollouts] == [c.token_ids for c in plain]
    without = subject.generation.chat(
        conversations[:1], GREEDY, chat_template=TEMPLATE, chat_template_kwargs={"add_generation_prompt": False}
    )
    assert subject.text(without.prompt_ids[0]) == "u:hi;"


def test_a_conversation_that_the_template_refuses_does_not_lose_the_others(subject):
    conversations = [[{"role": "user", "content": "hi"}], [{"role": "x", "content": "secret"}]]
    with pytest.raises(PromptError, match="prompt 1 was refused by the chat template: no role x") as caught:
        subject.generation.chat(conversations, GREEDY, chat_template=TEMPLATE)
    assert "secret" not in str(caught.value)
    marked = subject.generation.chat(conversations, GREEDY, 2, chat_template=TEMPLATE, refused="mark")
    assert [completion.error is None for completion in marked] == [True, True, False, False]
    with pytest.raises(ValueError, match="chat_template"):  # neither the tokenizer nor the caller has one
        subject.generation.chat(conversations, GREEDY)


# --- structured outputs ----------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ({"regex": "(ab|c){2}"}, {"abab", "abc", "cab", "cc"}),
        ({"choice": ["yes", "no", "perhaps"]}, {"yes", "no", "perhaps"}),
        ({"grammar": 'root ::= "x" ("1" | "2") "y"'}, {"x1y", "x2y"}),
        ({"json": SCHEMA}, [{"a": a, "b": b} for a in ("x", "yy") for b in (True, False)]),
    ],
)
def test_structured_outputs(subject, asked, allowed):
    sampling = Sampling(max_tokens=220, seed=1, structured_outputs=asked)  # JSON may have any whitespace
    for completion in subject.generation.generate(["write: "], sampling, 4):
        assert completion.finish_reason == "stop"
        text = subject.text(completion.token_ids)
        assert (json.loads(text) if "json" in asked else text) in allowed


@pytest.mark.parametrize(
    "senseless",
    [{"regex": "("}, {"regex": 5}, {"json": {"type": 3}}, {"json": "{"}, {"choice": []}, {"grammar": "nonsense ("}],
)
def test_an_invalid_structure_is_an_error_that_names_it(subject, senseless):
    with pytest.raises(ValueError, match="structured_outputs"):
        subject.generation.generate(["a", "b"], Sampling(max_tokens=4, structured_outputs=senseless), 2)
    assert subject.well()


@pytest.mark.parametrize(
    ("extra", "match"),
    [({"bad_words": 3}, "int"), ({"logprobs": 5000}, "logprobs"), ({"allowed_token_ids": [9999]}, "allowed_token_ids")],
)
def test_an_invalid_parameter_is_an_error_and_the_engine_still_works(subject, extra, match):
    with pytest.raises((ValueError, TypeError), match=match):
        subject.generation.generate(["a", "b"], Sampling(max_tokens=4, extra=extra))
    assert subject.well()


# --- adapters --------------------------------------------------------------------------------------------------------


def adapter(subject: Subject, folder: Any, *, rank: int = 4, seed: int = 1) -> Any:
    """A PEFT model on a copy of the subject's model; its adapter is saved in `folder`."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        )
        adapted = get_peft_model(copy.deepcopy(subject.model), config).eval()
    adapted.save_pretrained(folder)
    return adapted


def sampled(subject: Subject, name: str, folder: Any) -> Any:
    wanted = LoRARequest(lora_name=name, lora_path=str(folder))
    prompt = [1, 2, 3] * 20  # longer than a block of the prefix cache
    (completion,) = subject.generation.generate([prompt], Sampling(max_tokens=8, ignore_eos=True), lora_request=wanted)
    return prompt, completion


def test_an_adapter_changes_the_logprobs_to_those_of_the_peft_model(subject, tmp_path):
    adapted = [adapter(subject, tmp_path / str(seed), seed=seed) for seed in range(3)]
    for seed in (0, 1, 2, 0):  # one adapter more than the engine holds
        prompt, completion = sampled(subject, f"adapter-{seed}", tmp_path / str(seed))
        assert agrees(adapted[seed], prompt, completion)
        assert not agrees(adapted[seed - 1], prompt, completion)
        assert not agrees(subject.model, prompt, completion)
    assert subject.well()
    scored = subject.generation.score(
        ["abc"], [[5, 6]], lora_request=LoRARequest(lora_name="adapter-1", lora_path=str(tmp_path / "1"))
    )
    assert scored[0] == pytest.approx(own_logprobs(adapted[1], subject.ids("abc"), [5, 6]), abs=1e-4)


def test_an_adapter_that_changed_under_the_same_name_is_loaded_again(subject, tmp_path):
    adapter(subject, tmp_path / "a", seed=11)
    sampled(subject, "policy", tmp_path / "a")
    changed = adapter(subject, tmp_path / "a", seed=12)
    assert agrees(changed, *sampled(subject, "policy", tmp_path / "a"))
    elsewhere = adapter(subject, tmp_path / "b", seed=13)
    assert agrees(elsewhere, *sampled(subject, "policy", tmp_path / "b"))


def test_an_adapter_goes_on_top_of_the_weights_of_the_last_sync(subject, tmp_path):
    adapter(subject, tmp_path, seed=21)
    sampled(subject, "kept", tmp_path)
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    subject.generation.sync_weights()
    on_top = copy.deepcopy(subject.model)
    from peft import PeftModel

    assert agrees(PeftModel.from_pretrained(on_top, tmp_path).eval(), *sampled(subject, "kept", tmp_path))


def test_an_adapter_that_cannot_be_loaded_is_an_error_that_says_why(subject, tmp_path):
    adapter(subject, tmp_path / "big", rank=16)
    (tmp_path / "empty").mkdir()
    for name, folder, match in (
        ("nowhere", tmp_path / "nowhere", "nowhere"),
        ("empty", tmp_path / "empty", "empty"),
        ("big", tmp_path / "big", "max_lora_rank"),
        ("pathless", "", "pathless"),
    ):
        with pytest.raises(ValueError, match=match):
            sampled(subject, name, folder)
        assert subject.well()


# --- log-probabilities of the prompt ---------------------------------------------------------------------------------


def test_prompt_logprobs_are_the_models_own(subject):
    prompt = [5, 6, 7, 8, 9]
    sampling = Sampling(temperature=0.5, max_tokens=3, prompt_logprobs=0, ignore_eos=True)
    for completion in subject.generation.generate([prompt, prompt], sampling, 2):  # the second with a warm cache
        first, *rest = completion.prompt_logprobs
        assert first is None
        assert rest == pytest.approx(own_logprobs(subject.model, prompt[:1], prompt[1:]), abs=1e-4)
        assert len(completion.token_ids) == 3


def test_score_equals_the_models_logprobs_also_for_an_empty_completion(subject):
    prompts, completions = ["abc", [1, 2, 3], [4]], [[7, 8, 9], [], [10]]
    scored = subject.generation.score(prompts, completions)
    for prompt, completion, found in zip(prompts, completions, scored, strict=True):
        ids = subject.ids(prompt) if isinstance(prompt, str) else prompt
        assert found == pytest.approx(own_logprobs(subject.model, ids, completion), abs=1e-4)


def test_score_takes_completions_that_filled_the_context(subject):
    length = subject.generation.max_model_length
    prompts = [[5] * (length - 3), [1, 2, 3]]
    rollouts = subject.generation.generate(prompts, Sampling(max_tokens=6, ignore_eos=True))
    assert [len(completion.token_ids) for completion in rollouts] == [3, 6]
    for prompt, completion, found in zip(prompts, rollouts, subject.generation.score(prompts, rollouts), strict=True):
        assert found == pytest.approx(own_logprobs(subject.model, prompt, completion.token_ids), abs=1e-4)


def test_a_nan_comes_back_as_none(subject):
    head = subject.model.lm_head.weight
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head[20] = float("nan")
        subject.generation.sync_weights()
        assert subject.generation.score([[1, 2]], [[3, 4]]) == [[None, None]]
        (completion,) = subject.generation.generate([[1, 2]], Sampling(max_tokens=2, ignore_eos=True, logprobs=2))
        assert completion.logprobs == [None, None]
        assert {logprob for position in completion.top_logprobs for _, logprob in position} == {None}
    finally:
        with torch.no_grad():
            head.copy_(kept)
        subject.generation.sync_weights()
    assert subject.well()


# --- the rest --------------------------------------------------------------------------------------------------------


def test_each_token_has_the_version_of_the_weights_that_sampled_it(subject):
    subject.generation.sync_weights(version="seven")
    for completion in subject.generation.generate([[1], [2, 3]], Sampling(max_tokens=5, ignore_eos=True), 2):
        assert completion.weight_versions == [("seven", 0, 5)]
        assert completion.weight_version == "seven"


def test_a_priority_is_accepted(subject):
    assert len(subject.generation.generate([[1], [2]], Sampling(max_tokens=2), priority=-3)) == 2


def test_one_bad_prompt_does_not_lose_the_others(subject):
    limit = subject.generation.max_model_length - 1
    prompts = [[1, 2], [], [3], [1] * (limit + 1), [272]]
    marked = subject.generation.generate(prompts, Sampling(max_tokens=4, ignore_eos=True), 2, refused="mark")
    assert [completion.error is None for completion in marked] == [True] * 2 + [False] * 2 + [True] * 2 + [False] * 4
    assert all(agrees(subject.model, marked.prompt_ids[c.prompt_index], c) for c in marked if c.error is None)
    assert [completion.error.index for completion in marked if completion.error] == [1, 1, 3, 3, 4, 4]


def test_a_stream_a_task_and_a_call_give_the_same_completions(subject):
    import asyncio

    sampling = Sampling(max_tokens=6, seed=5, ignore_eos=True)
    called = subject.generation.generate([[1, 2], [3]], sampling, 2)
    streamed = {(c.prompt_index, c.generation_index): c for c in subject.generation.stream([[1, 2], [3]], sampling, 2)}
    awaited = asyncio.run(subject.generation.agenerate([[1, 2], [3]], sampling, 2))
    for one, other in zip(called, awaited, strict=True):
        assert one.token_ids == other.token_ids == streamed[one.prompt_index, one.generation_index].token_ids


def test_each_completion_has_its_own_seed(subject):
    sampling = Sampling(max_tokens=12, seed=3, ignore_eos=True)
    group = subject.generation.generate([[1, 2]], sampling, 4)
    assert len({tuple(completion.token_ids) for completion in group}) == 4
    for number, completion in enumerate(group):
        alone = Sampling(max_tokens=12, seed=request_seed(3, 0, number), ignore_eos=True)
        assert subject.generation.generate([[1, 2]], alone)[0].token_ids == completion.token_ids
