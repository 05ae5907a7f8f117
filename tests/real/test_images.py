"""Images for a vision model on real vLLM: its log-probabilities are those of transformers."""

from __future__ import annotations

import base64
import copy
import io
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.waiting import wait_until
from PIL import Image

from vgen import (
    ColocateGeneration,
    Generation,
    ProfilingContext,
    PromptError,
    Sampling,
    ServerConnection,
    ServerGeneration,
)
from vgen.engine_protocol import EngineState
from vgen.engines.client import batch_client
from vgen.engines.server.launcher import start_server
from vgen.profiling import semconv
from vgen.testing import MemorySink, tiny_vision_model

SAMPLING = Sampling(max_tokens=8, ignore_eos=True, seed=2)
SHAPES = {"noise": (40, 50), "other": (40, 50), "wide": (20, 64), "small": (8, 8), "fresh": (30, 50)}
ENGINES = ["colocate", "server"]
"""Each names a fixture `vision_<name>`."""

pytestmark = pytest.mark.slow  # these tests start engines, for a vision model


def picture(name: str) -> Image.Image:
    """Noise, always the same for the same name."""
    random = np.random.default_rng(sorted(SHAPES).index(name))
    return Image.fromarray(random.integers(0, 255, (*SHAPES[name], 3), dtype=np.uint8))


class Vision:
    """A tiny vision model with a generation object."""

    def __init__(self, model, processor, generation, sink):
        self.model, self.processor, self.generation, self.sink = model, processor, generation, sink

    def ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text)["input_ids"]

    def expanded(self, text: str, images: list[Image.Image]) -> list[int]:
        return self.processor(text=text, images=images)["input_ids"][0]

    def logprobs(self, text: str, images: list[Image.Image], token_ids: list[int]) -> list[float]:
        """The log-probabilities that the transformers model gives to `token_ids`, teacher-forced."""
        inputs = dict(self.processor(text=text, images=images or None, return_tensors="pt"))
        prompt = inputs.pop("input_ids")
        whole = torch.cat([prompt, torch.tensor([token_ids])], dim=1)
        inputs["attention_mask"] = torch.ones_like(whole)
        with torch.no_grad():
            logits = self.model(input_ids=whole, **inputs).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        return logits.gather(-1, torch.tensor(token_ids)[:, None])[:, 0].tolist()

    def difference(self, completion, text: str, *images: str) -> float:
        own = self.logprobs(text, [picture(name) for name in images], completion.token_ids)
        return max(abs(a - b) for a, b in zip(own, completion.logprobs, strict=True))

    def idle(self) -> bool:
        """Whether the engine has no unfinished request."""
        engine = self.generation.engine
        if engine.kind == "colocate":
            return not engine.llm.llm_engine.has_unfinished_requests()
        lines = urllib.request.urlopen(f"{engine.endpoints[0].name}/metrics", timeout=10).read().decode().splitlines()
        counts = [line for line in lines if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting"))]
        return len(counts) >= 2 and all(float(line.split()[-1]) == 0 for line in counts)


@pytest.fixture(scope="module")
def vision_colocate(tmp_path_factory) -> Iterator[Vision]:
    model, processor = tiny_vision_model(tmp_path_factory.mktemp("vision"))
    sink = MemorySink()
    generation = ColocateGeneration(
        model,
        processing_class=processor,
        max_model_length=256,
        profiling=ProfilingContext([sink]),
        engine_kwargs={"kv_cache_memory_bytes": 32 << 20, "limit_mm_per_prompt": {"image": 3}},
    )
    yield Vision(model, processor, generation, sink)
    generation.close()


@pytest.fixture(scope="module")
def vision_server(tmp_path_factory) -> Iterator[Vision]:
    folder = tmp_path_factory.mktemp("vision")
    model, processor = tiny_vision_model(folder)
    sink = MemorySink()
    arguments = ["--max-model-len", "256", "--dtype", "float32", "--kv-cache-memory-bytes", str(32 << 20)]
    arguments += ["--limit-mm-per-prompt", '{"image": 3}']
    with (
        start_server(folder, arguments=arguments, timeout=280) as served,
        ServerGeneration(
            model,
            base_urls=served.url,
            control_key=served.control_key,
            processing_class=processor,
            connection=ServerConnection(timeout=120.0),
            profiling=ProfilingContext([sink]),
        ) as generation,
    ):
        yield Vision(model, processor, generation, sink)


@pytest.fixture(params=ENGINES)
def vision(request) -> Vision:
    found: Vision = request.getfixturevalue(f"vision_{request.param}")
    found.sink.clear()
    return found


def test_what_the_engine_sees_is_what_transformers_sees(vision):
    prompts = {"ab<image>cd": ["noise"], "<image>": ["wide"], "x<image>y<image>": ["small", "noise"], "no image": []}
    rollouts = vision.generation.generate(
        list(prompts), SAMPLING, 2, images=[[picture(name) for name in images] or None for images in prompts.values()]
    )
    assert len(rollouts) == 8
    for completion in rollouts:
        text = list(prompts)[completion.prompt_index]
        assert vision.difference(completion, text, *prompts[text]) < 1e-4
    assert rollouts.prompt_ids == [vision.ids(text) for text in prompts]
    # The model uses the images: other images, or another order, give other log-probabilities.
    assert vision.difference(rollouts[0], "ab<image>cd", "other") > 1e-2
    assert vision.difference(rollouts[4], "x<image>y<image>", "noise", "small") > 1e-2


def test_prompts_with_expanded_placeholders_give_the_same_result(vision):
    """Processors and TRL expand placeholders. vLLM by itself would expand the first token of an image once more."""
    for text, images in (("ab<image>cd", ["noise"]), ("<image><image>x<image>", ["wide", "wide", "small"])):
        own = [picture(name) for name in images]
        ids = vision.expanded(text, own)
        assert len(ids) > len(vision.ids(text))
        (completion,) = rollouts = vision.generation.generate([ids], SAMPLING, images=[own])
        assert vision.difference(completion, text, *images) < 1e-4
        assert rollouts.prompt_ids == [ids]
        swapped = [picture("wide" if images[0] == "noise" else "noise"), *own[1:]]  # expands to other tokens
        with pytest.raises(PromptError, match=r"prompt 0 has \d+ tokens in the place of images"):
            vision.generation.generate([ids], SAMPLING, images=[swapped])


def test_after_a_sync_an_image_is_not_answered_from_the_old_weights(vision):
    text, own = "ab<image>cd", [[picture("noise")]]
    before = vision.generation.generate([text], SAMPLING, images=own)
    kept = copy.deepcopy(vision.model.state_dict())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for name, parameter in vision.model.named_parameters():
                if "vision_model" in name:  # only the encoder changes, so that only its cache can be stale
                    parameter.add_(torch.randn_like(parameter) * 0.5)
        vision.generation.sync_weights()
        assert vision.difference(before[0], text, "noise") > 1e-3
        after = vision.generation.generate([text], SAMPLING, images=own)
        assert vision.difference(after[0], text, "noise") < 1e-4
    finally:
        vision.model.load_state_dict(kept)
        vision.generation.sync_weights()


@pytest.mark.parametrize(
    ("prompt", "images", "problem"),
    [
        ("a<image>", None, "1 tokens in the place of images, which do not fit its 0 images"),
        ("a<image>b<image>", ["noise"], "2 tokens in the place of images, which do not fit its 1 images"),
        ("a<image>", ["noise", "wide"], "1 tokens in the place of images, which do not fit its 2 images"),
        ("a", ["noise"], "images that vLLM could not put in their places"),
        ("a<image>" + "b" * 230, ["other"], "265 tokens with its images; at most 255 leave room"),
        ("a" + "<image>" * 4, ["small"] * 4, "images that vLLM could not put in their places.*At most 3"),
        ("a<image>", ["a path"], "an image that is not a PIL.Image.Image"),
    ],
)
def test_a_prompt_that_does_not_fit_its_images_is_refused_and_the_others_go_on(vision, prompt, images, problem):
    own = images and [picture(name) if name in SHAPES else name for name in images]
    asked = dict(prompts=["hello", prompt, "z<image>"], images=[None, own, [picture("wide")]])
    with pytest.raises(PromptError, match=f"^prompt 1 .*{problem}") as caught:
        vision.generation.generate(**asked, sampling=SAMPLING)
    assert caught.value.index == 1
    assert caught.value.limit == (255 if "255" in problem else None)
    assert vision.generation.state is EngineState.AWAKE
    marked = vision.generation.generate(**asked, sampling=SAMPLING, num_generations=2, refused="mark")
    assert [completion.error is None for completion in marked] == [True, True, False, False, True, True]
    assert [completion.finish_reason for completion in marked.group(1)] == ["error", "error"]
    assert [bool(ids) for ids in marked.prompt_ids] == [True, False, True]
    assert vision.difference(marked[4], "z<image>", "wide") < 1e-4
    streamed = list(vision.generation.stream(**asked, sampling=SAMPLING, refused="mark"))
    assert sorted((c.prompt_index, c.error is None) for c in streamed) == [(0, True), (1, False), (2, True)]
    with pytest.raises(PromptError, match="prompt 1"):
        list(vision.generation.stream(**asked, sampling=SAMPLING))
    wait_until(vision.idle, 20)


def test_bytes_that_are_not_an_image_fail_only_their_prompt(vision, monkeypatch):
    if vision.generation.engine.kind != "server":
        pytest.skip("images travel as bytes to a server alone")
    sent = iter([b"no picture", batch_client._png(picture("wide"))])
    monkeypatch.setattr(batch_client, "_png", lambda image: next(sent))
    own = [[picture("noise")], [picture("wide")]]
    marked = vision.generation.generate(["a<image>", "z<image>"], SAMPLING, images=own, refused="mark")
    assert [completion.error is None for completion in marked] == [False, True]
    assert "has an image that PIL does not open" in str(marked[0].error)
    assert vision.difference(marked[1], "z<image>", "wide") < 1e-4


def test_an_image_of_a_refused_prompt_may_come_again(vision):
    own = [[picture("fresh")]]
    with pytest.raises(PromptError, match="at most 255"):
        vision.generation.generate(["a<image>" + "b" * 230], SAMPLING, images=own)
    (completion,) = vision.generation.generate(["a<image>"], SAMPLING, images=own)
    assert vision.difference(completion, "a<image>", "fresh") < 1e-4


def test_images_without_a_processor_have_one_placeholder_each(vision):
    without = Generation(vision.generation.engine, vision.generation.source)
    own = [picture("noise")]
    ids = vision.ids("ab<image>cd")
    assert vision.difference(without.generate([ids], SAMPLING, images=[own])[0], "ab<image>cd", "noise") < 1e-4
    for prompt, images in ((vision.expanded("ab<image>cd", own), own), (ids, None)):
        with pytest.raises(PromptError, match=r"has \d+ placeholders for images and \d images"):
            without.generate([prompt], SAMPLING, images=[images])


def uri(image: Image.Image) -> str:
    written = io.BytesIO()
    image.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def test_chat_takes_images_out_of_the_messages_in_order(vision):
    hi = {"type": "text", "text": "hi"}
    conversations = [
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "image", "image": picture("wide")}, hi]},
            {"role": "user", "content": [hi, {"type": "image_url", "image_url": {"url": uri(picture("noise"))}}]},
        ],
        [{"role": "user", "content": "text"}],
    ]
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    rollouts = vision.generation.chat(conversations, SAMPLING, tools=[tool])
    texts = ["s:s;u:<image>hi;u:hi<image>;T1a:", "u:text;T1a:"]
    assert rollouts.prompt_ids == [vision.ids(text) for text in texts]
    assert vision.difference(rollouts[0], texts[0], "wide", "noise") < 1e-4
    assert vision.difference(rollouts[0], texts[0], "noise", "wide") > 1e-2
    assert vision.difference(rollouts[1], texts[1]) < 1e-4
    # The form of datasets: a placeholder in the message, and the images in a separate argument.
    apart = [[{"role": "user", "content": [{"type": "image"}, hi]}]]
    rollouts = vision.generation.chat(apart, SAMPLING, images=[[picture("small")]])
    assert vision.difference(rollouts[0], "u:<image>hi;a:", "small") < 1e-4
    with pytest.raises(ValueError, match="the conversations hold images"):
        vision.generation.chat(conversations, SAMPLING, images=[None, None])


@pytest.mark.parametrize(
    "source", ["http://127.0.0.1:1/cat.png", "/etc/passwd", "data:image/png;base64,AAAA", "data:image/png;base64,!"]
)
def test_chat_fetches_nothing_and_one_bad_image_does_not_lose_the_others(vision, source):
    bad = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": source}}]}]
    good = [{"role": "user", "content": [{"type": "image", "image": picture("wide")}]}]
    with pytest.raises(PromptError, match="prompt 1 has a"):
        vision.generation.chat([good, bad], SAMPLING)
    marked = vision.generation.chat([good, bad], SAMPLING, refused="mark")
    assert [completion.error is None for completion in marked] == [True, False]
    assert vision.difference(marked[0], "u:<image>;a:", "wide") < 1e-4


def test_score_sees_the_image(vision):
    text, own, ids = "ab<image>cd", [picture("noise")], [5, 6, 7]
    for prompt in (text, vision.ids(text), vision.expanded(text, own)):
        (scored,) = vision.generation.score([prompt], [ids], images=[own])
        assert scored == pytest.approx(vision.logprobs(text, own, ids), abs=1e-4)


def test_refused_requests_are_not_in_the_numbers(vision):
    asked = dict(prompts=["a", "b"], images=[[picture("noise")], None])
    vision.generation.generate(**asked, sampling=SAMPLING, num_generations=3, refused="mark")
    (span,) = vision.sink.named(semconv.GENERATE)
    assert (span.attributes[semconv.COMPLETIONS], span.attributes[semconv.INPUT_TOKENS]) == (3, 3)
    assert span.attributes[semconv.REFUSED] == 1
