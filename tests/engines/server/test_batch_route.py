"""vgen's batch route in the server: a frame for each completion, signs of life, and refusals."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from vgen import PromptError

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")

from vgen import completion_codec as codec
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
    return BatchAnswer(batch, engine, list(inputs), [SimpleNamespace(logprobs=0)] * len(batch.wanted), None)


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
    states["b"] = SimpleNamespace(external_req_id="other-0", stats=stats)
    stream = answer(engine, inputs=[[1]]).frames()
    assert decoded(await anext(stream)) == [codec.Alive(1, 5)]
    del engine.output_processor
    assert decoded(await anext(stream)) == [codec.Alive(1, None)]
    engine.gates["call-0"].set()
    rest = [frame async for chunk in stream for frame in decoded(chunk)]
    assert [type(frame) for frame in rest if not isinstance(frame, codec.Alive)] == [codec.Done, codec.End]


async def test_leaving_early_aborts_what_is_not_finished():
    engine = Engine()
    engine.gates = {"call-1": asyncio.Event()}
    stream = answer(engine).frames()
    await anext(stream)
    await stream.aclose()
    await asyncio.sleep(0)
    assert engine.cancelled == ["call-1"]
