"""vgen's batch route in the server: a frame for each completion, signs of life, and refusals."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vgen import PromptError

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")

from vgen import completion_codec as codec
from vgen.engines.server import batch_route
from vgen.engines.server.batch_route import BatchAnswer


class Engine:
    """Answers each request with its prompt's tokens, once its event is set."""

    def __init__(self) -> None:
        self.asked: dict[str, dict] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []
        self.output_processor = SimpleNamespace(request_states={})

    async def generate(self, prompt, parameters, request_id, **options):
        self.asked[request_id] = options
        try:
            if request_id in self.gates:
                await self.gates[request_id].wait()
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        result = SimpleNamespace(token_ids=prompt, logprobs=None, finish_reason="length", weight_versions=None)
        yield SimpleNamespace(
            outputs=[result], request_id=request_id, prompt_logprobs=None, metrics=None, num_cached_tokens=0
        )


def answer(engine, inputs=([1], [2]), **wanted):
    asked = [codec.Wanted(place, None, None) for place in range(len(inputs))]
    batch = codec.BatchRequest("call", [], wanted.get("wanted", asked), {})
    parameters = [SimpleNamespace(logprobs=0)] * len(batch.wanted)
    return BatchAnswer(batch, engine, list(inputs), parameters, None, wanted.get("problem", str))


def decoded(chunk: bytes) -> list:
    frames = []
    while chunk:
        length = int.from_bytes(chunk[:4], "big")
        frames.append(codec.decode_frame(chunk[4 : 4 + length]))
        chunk = chunk[4 + length :]
    return frames


async def frames_of(answer) -> list:
    return [frame async for chunk in answer.frames() for frame in decoded(chunk)]


async def test_each_completion_is_a_frame_and_the_end_is_the_last():
    *done, end = await frames_of(answer(Engine()))
    assert {frame.index: codec.unpack(frame.completion).token_ids for frame in done} == {0: [1], 1: [2]}
    assert {codec.unpack(frame.completion).request_id for frame in done} == {"call-0", "call-1"}
    assert isinstance(end, codec.End)


async def test_the_engine_gets_each_requests_trace_context():
    engine = Engine()
    wanted = [codec.Wanted(0, 1, "00-a-b-01"), codec.Wanted(0, 2, None)]
    await frames_of(answer(engine, wanted=wanted))
    assert engine.asked["call-0"]["trace_headers"] == {"traceparent": "00-a-b-01"}
    assert engine.asked["call-1"]["trace_headers"] is None


async def test_a_prompt_that_is_refused_is_its_own_matter():
    *frames, _ = await frames_of(answer(Engine(), inputs=[[1], PromptError(1, "is too long", 16)]))
    by_index = {frame.index: frame for frame in frames}
    assert by_index[1] == codec.Failed(1, 400, "is too long", 16)
    assert codec.unpack(by_index[0].completion).token_ids == [1]


async def test_an_error_of_the_engine_is_not_the_clients_fault():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    *frames, _ = await frames_of(answer(Engine(), inputs=[RuntimeError("broke"), ValueError("bad")]))
    assert {frame.index: (frame.status, frame.message) for frame in frames} == {
        0: (503, "RuntimeError: broke"),
        1: (400, "ValueError: bad"),
    }


async def test_a_server_that_works_for_long_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(codec, "HEARTBEAT_SECONDS", 0.01)
    engine = Engine()
    engine.gates = {"call-0": asyncio.Event()}
    stats = SimpleNamespace(num_generation_tokens=5)
    states = engine.output_processor.request_states
    states["a"] = SimpleNamespace(external_req_id="call-0", stats=stats)
    for other in ("other-0", "call-1", "call-0-0", "call-00", "cal"):  # of calls whose IDs begin alike
        states[other] = SimpleNamespace(external_req_id=other, stats=stats)
    stream = answer(engine, inputs=[[1]]).frames()
    assert decoded(await anext(stream)) == [codec.Alive(1, 5)]
    del engine.output_processor
    assert decoded(await anext(stream)) == [codec.Alive(1, None)]
    engine.gates["call-0"].set()
    rest = [frame async for chunk in stream for frame in decoded(chunk)]
    assert [type(frame) for frame in rest if not isinstance(frame, codec.Alive)] == [codec.Done, codec.End]


@pytest.mark.fault(
    point="a call on the batch route",
    did="The engine fails during a call",
    happens="The stream ends with the reason instead of signs of life",
    within=20,
)
async def test_an_engine_that_cannot_work_ends_the_signs_of_life_with_the_reason(monkeypatch):
    monkeypatch.setattr(codec, "HEARTBEAT_SECONDS", 0.01)
    engine, problem = Engine(), [""]
    engine.gates = {"call-1": asyncio.Event()}
    stream = answer(engine, problem=lambda: problem[0]).frames()
    assert [type(frame) for frame in decoded(await anext(stream))] == [codec.Done]
    assert decoded(await anext(stream)) == [codec.Alive(1, 0)]
    problem[0] = "the engine is stopped"
    rest = [frame async for chunk in stream for frame in decoded(chunk)]
    assert rest == [codec.Failed(1, 503, "the engine is stopped"), codec.End()]
    await asyncio.sleep(0)
    assert engine.cancelled == ["call-1"]  # once it goes on, it has nothing to sample for nobody


@pytest.mark.fault(
    point="a call on the batch route",
    did="The client disconnects",
    happens="What is not finished is aborted",
    within=20,
)
async def test_leaving_early_aborts_what_is_not_finished():
    engine = Engine()
    engine.gates = {"call-1": asyncio.Event()}
    stream = answer(engine).frames()
    await anext(stream)
    await stream.aclose()
    await asyncio.sleep(0)
    assert engine.cancelled == ["call-1"]


# Calls that are wrong


class Renderer:
    async def render_cmpl_async(self, prompts, **_) -> list[Any]:
        return [prompt["prompt_token_ids"] for prompt in prompts]


class Calls:
    """Sends bodies to the route of a server with a fake engine, and counts which bytes it took."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.engine.renderer, self.engine.get_tokenizer = Renderer(), lambda: None  # pyright: ignore
        model = SimpleNamespace(is_multimodal_model=True, is_encoder_decoder=False, hf_config=None)
        model.max_model_len = 64
        config = SimpleNamespace(model_config=model, speculative_config=None, structured_outputs_config=None)
        models = SimpleNamespace(lora_requests={})
        self.state = SimpleNamespace(vllm_config=config, engine_client=self.engine, openai_serving_models=models)
        self.taken = 0

    async def __call__(self, *chunks: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """The status, and the frames or the error's message."""
        from starlette.requests import Request

        left = list(chunks)

        async def receive() -> dict[str, Any]:
            chunk = left.pop(0) if left else b""
            self.taken += len(chunk)
            return {"type": "http.request", "body": chunk, "more_body": bool(left)}

        pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": "POST", "headers": pairs, "app": SimpleNamespace(state=self.state)}
        response: Any = await batch_route.generate(Request(scope, receive))
        if response.status_code != 200:
            return response.status_code, json.loads(response.body)["error"]["message"]
        return 200, [frame async for chunk in response.body_iterator for frame in decoded(chunk)]


@pytest.fixture
def calls(monkeypatch):
    pytest.importorskip("starlette", reason="starlette is not installed")
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setattr(vllm.SamplingParams, "verify", lambda *_: None)  # it needs a model's whole configuration
    return Calls()


def body(**changes: Any) -> bytes:
    batch = {"id": "x", "prompts": [codec.ints([1])], "wanted": [[0, None, None]], "sampling": {}}
    return codec.encode(batch | changes)


def png(width: int = 1, height: int = 1) -> bytes:
    """A PNG whose header claims this size. It has the pixels of one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def picture(form: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, form)
    return file.getvalue()


NESTED = body()[:-1] + b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0"
"""A list in a list in a list, in `sampling`."""
WRONG = {
    "no prompt of that number": body(wanted=[[0, None, None], [1, None, None]]),
    "a negative number": body(wanted=[[-1, None, None]]),
    "no prompts": body(prompts=[]),
    "fewer images than prompts": body(prompts=[codec.ints([1])] * 2, images=[[]]),
    "more images than prompts": body(images=[[], []]),
    "half a token": body(prompts=[b"abc"]),
    "a long id": body(id="x" * 201),
    "deep nesting": NESTED,
    "deep nesting in an unknown field": body(unknown=0)[:-1] + b"\x91" * 100_000 + b"\xc0",
    "a list that claims 4 billion items": body()[:-1] + b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "a wrong type": body(prompts=[1]),
    "a wrong type of a parameter": body(sampling={"extra": {"stop": 3}}),
    "another wrong type of a parameter": body(sampling={"extra": {"bad_words": 3}}),
    "not a parameter": body(sampling={"nothing": 3}),
    "nothing": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("raw", WRONG.values(), ids=WRONG)
@pytest.mark.fault(
    point="a call on the batch route",
    did="Fields contradict each other or are out of range",
    happens="400 before anything runs",
    within=20,
)
async def test_a_call_that_is_wrong_is_refused_before_anything_runs(calls, raw):
    async with asyncio.timeout(20):
        status, message = await calls(raw)
    assert (status, calls.engine.asked) == (400, {}), message


async def test_a_call_that_is_right_is_answered(calls):
    _, (done, end) = await calls(body()[:9], body()[9:])  # in two pieces
    assert codec.unpack(done.completion).token_ids == [1]
    assert isinstance(end, codec.End)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (picture("JPEG"), "PIL does not open as PNG"),
        (picture("GIF"), "PIL does not open as PNG"),
        (picture("BMP"), "PIL does not open as PNG"),
        (picture("PNG")[:-30], "PIL does not open as PNG"),
        (b"", "PIL does not open as PNG"),
        (png(8193, 8192), "8193 × 8192 pixels; the limit is 67108864"),
    ],
    ids=["JPEG", "GIF", "BMP", "cut off", "empty", "too large"],
)
@pytest.mark.fault(
    point="a call on the batch route",
    did="An image is damaged",
    happens="Its own prompt is refused, the others are answered",
    within=20,
)
async def test_an_image_that_is_no_good_png_is_its_prompts_own_matter(calls, image, problem):
    two = body(prompts=[codec.ints([1])] * 2, wanted=[[0, None, None], [1, None, None]], images=[[image], []])
    status, frames = await calls(two)
    by_index = {frame.index: frame for frame in frames[:-1]}
    assert (status, by_index[0].status) == (200, 400)
    assert problem in by_index[0].message
    assert codec.unpack(by_index[1].completion).token_ids == [1]


@pytest.mark.fault(
    point="a call on the batch route",
    did="A small PNG claims to be enormous",
    happens="It is refused before it is decoded",
    within=20,
)
def test_the_pixels_of_an_image_are_counted_before_they_are_decoded(monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    loaded: list[Any] = []
    monkeypatch.setattr(image.Image, "load", loaded.append)
    with pytest.raises(PromptError, match="pixels"):
        batch_route._opened(0, [png(8193, 8192)])
    assert loaded == []


async def test_a_body_that_says_that_it_is_too_long_is_not_read(calls, monkeypatch):
    monkeypatch.setattr(codec, "BODY_LIMIT", 100)
    status, message = await calls(b"x" * 101, headers={"content-length": "101"})
    assert (status, calls.taken) == (413, 0)
    assert "longer than 100 bytes" in message


@pytest.mark.fault(
    point="a call's body on the server",
    did="A batch without a length is endless",
    happens="413 at the limit",
    within=20,
)
async def test_a_body_is_read_no_further_than_to_the_limit(calls, monkeypatch):
    monkeypatch.setattr(codec, "BODY_LIMIT", 100)
    for headers in ({}, {"content-length": "5"}, {"content-length": "x"}):
        calls.taken = 0
        assert (await calls(*[b"x" * 40] * 10, headers=headers))[0] == 413
        assert calls.taken == 120
    assert (await calls(body() + bytes(100 - len(body()))))[0] == 400  # exactly the limit is read, and is no request


def test_the_limit_leaves_room_for_a_large_step():
    assert len(codec.encode(codec.BatchRequest("x", [bytes(4 * 8192)] * 4000, [], {}))) <= codec.BODY_LIMIT


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["max_tokens", "stop", "logprobs", "extra", "structured_outputs", "temperature", "seed"])
MORE = st.sampled_from(["stop", "bad_words", "logit_bias", "n", "allowed_token_ids", "truncate_prompt_tokens", "x"])
SAMPLINGS = st.dictionaries(NAMES, VALUES, max_size=3) | st.fixed_dictionaries(
    {"extra": st.dictionaries(MORE, VALUES, max_size=2)}
)
TYPED = st.fixed_dictionaries(
    {
        "prompts": st.lists(st.binary(min_size=1, max_size=8), max_size=3),
        "wanted": st.lists(st.tuples(st.integers(-2, 4), st.none() | st.integers(-(2**63), 2**64 - 1), st.none())),
        "images": st.lists(
            st.lists(st.sampled_from([b"", png(), png()[:-20], picture("GIF")]), max_size=2), max_size=3
        ),
    }
)
FIELDS = st.sampled_from(["id", "prompts", "wanted", "sampling", "images", "lora_name", "priority"])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Any bytes, or a right request with other values of fields, or with some bytes changed, cut out or put in."""
    kind = draw(st.sampled_from(["bytes", "field", "typed", "sampling", "changed"]))
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    if kind == "field":
        return body(**draw(st.dictionaries(FIELDS, VALUES, max_size=2)))
    if kind == "typed":
        return body(**draw(TYPED))
    if kind == "sampling":
        return body(sampling=draw(SAMPLINGS))
    raw = bytearray(body(images=[[picture("PNG")]], sampling={"max_tokens": 3, "extra": {"top_k": 2}}))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        raw[start : start + draw(st.integers(0, 3))] = draw(st.binary(max_size=5))
    return bytes(raw)


@settings(
    derandomize=True, max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(bodies())
@pytest.mark.fault(
    point="a call's body on the server",
    did="Bodies are damaged at random",
    happens="A refusal; never a 500, never a hang",
    within=60,
)
def test_no_body_is_an_error_of_the_servers_or_makes_it_hang(calls, raw):
    async def call() -> tuple[int, Any]:
        async with asyncio.timeout(10):
            return await calls(raw)

    status, answer = asyncio.run(call())
    assert status in (200, 400)
    if status == 200:
        assert isinstance(answer[-1], codec.End)
        assert all(frame.status == 400 for frame in answer if isinstance(frame, codec.Failed)), answer
