"""Prompts and their images, checked before vLLM renders them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vgen import PromptError
from vgen.engines.vllm_prompts import checked_length, model_prompt


def config(**fields):
    hf = SimpleNamespace(**{"image_token_id": 7, **fields.pop("hf", {})})
    return SimpleNamespace(**{"is_multimodal_model": True, "hf_config": hf, "max_model_len": 4, **fields})


def test_a_prompt_without_images_is_its_token_ids():
    assert model_prompt(0, (1, 2), (), config()) == {"prompt_token_ids": [1, 2]}


@pytest.mark.parametrize(
    ("token_ids", "images", "settings", "problem"),
    [
        ([1], ["image"], {"is_multimodal_model": False}, "has 1 images, and the model takes none"),
        ([7, 7], ["image"], {}, "has 2 placeholders for images and 1 images"),
        ([7], [], {}, "has 1 placeholders for images and 0 images"),
        ([8, 8], ["image"], {"hf": {"image_token_id": None, "image_token_index": 8}}, "has 2 placeholders"),
    ],
)
def test_images_that_do_not_fit_their_placeholders_are_refused(token_ids, images, settings, problem):
    with pytest.raises(PromptError, match=f"prompt 5 {problem}"):
        model_prompt(5, token_ids, images, config(**settings))


def test_a_rendered_prompt_leaves_room_for_a_token():
    prompt = {"prompt_token_ids": [1, 2, 3]}
    assert checked_length(0, prompt, config()) is prompt
    with pytest.raises(PromptError, match="has 4 tokens with its images; at most 3") as caught:
        checked_length(7, {"prompt_token_ids": [1, 2, 3, 4]}, config())
    assert (caught.value.index, caught.value.limit) == (7, 3)
