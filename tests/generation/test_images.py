"""Prompts in the form that engines take, for processors that write images each in their own way."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vgen import PromptError
from vgen.generation.images import Placeholders, check_images, take_images
from vgen.testing import byte_tokenizer, tiny_vision_model

pytest.importorskip("transformers", reason="transformers is not installed: it comes with the engine")

SIZES = {"wide": (20, 64), "high": (64, 20)}


def picture(name: str) -> Image.Image:
    random = np.random.default_rng(len(name))
    return Image.fromarray(random.integers(0, 255, (*SIZES[name], 3), dtype=np.uint8))


def llava():
    """One placeholder becomes as many of itself: so do Qwen-VL's, with as many as an image has patches."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(pictures, tokenizer, patch_size=8, vision_feature_select_strategy="full"), "<image>"


def qwen():
    from transformers import Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = byte_tokenizer()
    tokens = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    pictures = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4096)
    made = object.__new__(Qwen2VLProcessor)  # its constructor asks for a video processor, which needs torchvision
    made.image_processor, made.tokenizer, made.video_processor = pictures, tokenizer, None
    made.image_token, made.video_token, made.chat_template = "<|image_pad|>", "<|video_pad|>", None
    made.image_token_id, made.video_token_id = (tokenizer.convert_tokens_to_ids(t) for t in tokens[:2])
    return made, "<|image_pad|>"


def gemma():
    """The placeholder is a mark of its own, and what it becomes has marks around it."""
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = byte_tokenizer()
    own = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer.add_special_tokens({"additional_special_tokens": list(own.values())})
    for name, token in own.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    pictures = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Gemma3Processor(pictures, tokenizer, image_seq_length=4), "<boi>"


@pytest.fixture(scope="module")
def idefics(tmp_path_factory):
    return tiny_vision_model(tmp_path_factory.mktemp("vision"))[1], "<image>"


@pytest.fixture(params=["idefics", "llava", "qwen", "gemma"])
def written(request, idefics):
    return idefics if request.param == "idefics" else {"llava": llava, "qwen": qwen, "gemma": gemma}[request.param]()


def test_what_a_processor_has_expanded_is_one_placeholder_again(written):
    processor, token = written
    images = [picture("wide"), picture("high"), picture("wide")]
    text = f"a{token}{token}b{token}c"
    short = processor.tokenizer(text)["input_ids"]
    (expanded,) = processor(text=[text], images=[images])["input_ids"]
    expanded = list(map(int, expanded))
    assert len(expanded) > len(short)
    placeholders = Placeholders(processor)
    assert placeholders.one_each(0, expanded, images) == short
    assert placeholders.one_each(0, short, images) == short
    assert placeholders.one_each(0, [1, 2], ()) == [1, 2]
    for others in (images[:2], [*images, picture("high")]):
        with pytest.raises(PromptError, match=r"prompt 7 has \d+ tokens in the place of images"):
            placeholders.one_each(7, expanded, others)


def test_an_image_is_expanded_once(idefics, monkeypatch):
    processor, token = idefics
    calls = []
    real = type(processor).__call__
    monkeypatch.setattr(type(processor), "__call__", lambda self, **kwargs: calls.append(1) or real(self, **kwargs))
    image = picture("wide")
    ids = list(map(int, real(processor, text=[token], images=[[image]])["input_ids"][0]))
    placeholders = Placeholders(processor)
    for index in range(3):
        placeholders.one_each(index, ids, [image])
    assert len(calls) == 1


def test_messages_without_images_are_left_as_they_are():
    conversation = [{"role": "assistant", "tool_calls": [{"x": 1}], "content": None}, {"role": "user", "content": "a"}]
    assert take_images(0, conversation) == (conversation, [])
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    assert take_images(0, bare) == (bare, [])


def test_an_expansion_holds_no_special_tokens_of_a_text():
    """A tokenizer that begins every text with a token would look for it in the middle of a prompt."""

    class Tokenizer:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [50]}

    class Processor:
        image_token, image_token_id, tokenizer = "<image>", 50, Tokenizer()

        def __call__(self, text, images, add_special_tokens=True):
            return {"input_ids": [[1] * add_special_tokens + [50] * 4]}

    image = picture("wide")
    placeholders = Placeholders(Processor())
    assert placeholders.one_each(0, [7, 50, 50, 50, 50, 8], [image]) == [7, 50, 8]


BROKEN = "data:image/png;base64,"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("http://host/image.png", "neither a PIL.Image nor a base64 data: URI"),
        ("data:image/png,abc", "neither a PIL.Image nor a base64 data: URI"),
        (f"{BROKEN}AAAA", "holds no image"),
        (f"{BROKEN}*", "holds no image"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_with_its_prompt(source, says):
    part = {"type": "image_url", "image_url": {"url": source}}
    with pytest.raises(PromptError, match=says) as caught:
        take_images(3, [{"role": "user", "content": [part]}])
    assert caught.value.index == 3
    assert source not in str(caught.value)


def test_something_else_than_an_image_is_named_with_its_prompt():
    check_images(4, [Image.new("L", (1, 1))])
    with pytest.raises(PromptError, match=r"not a PIL\.Image") as caught:
        check_images(4, [Image.new("L", (1, 1)), "a path"])
    assert caught.value.index == 4
