"""vgen's batch route from the client: what it asks for, what comes back, and what counts as progress meanwhile."""

from __future__ import annotations

import pytest

from vgen import Completion, PromptError, Sampling, ServerError
from vgen.engine_protocol import Batch, Request

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")

from vgen import completion_codec as codec
from vgen.completion_codec import Alive, Done, End, Failed, pack
from vgen.engines.client import batch_client

REQUESTS = [Request(0, 0, [1], 7), Request(0, 1, [1], 8), Request(0, 0, [2], None, rank=1)]


class ScriptedServer:
    """A server that answers with the given frames, and keeps the request."""

    name = "http://scripted"

    def __init__(self, *frames):
        self.answers, self.request = frames, None
        self.watch, self.signs = self, 0

    def progressed(self):
        self.signs += 1

    async def frames(self, path, body, decode, *_):
        self.request = codec.decode_request(body)
        for frame in self.answers:
            yield decode(codec.encode(frame))


def done(index: int) -> Done:
    completion = Completion(prompt_index=9, generation_index=9, token_ids=[index], request_id=f"x-{index}")
    return Done(index, pack(completion), 0)


ALL = [done(index) for index in range(len(REQUESTS))]


async def ask(server, requests=REQUESTS, **batch):
    asked = Batch(requests, **{"sampling": Sampling(), **batch})
    return [answer async for answer in batch_client.complete(server, asked, requests, 1.0)]


async def test_completions_come_back_under_the_numbers_of_their_requests():
    answers = await ask(ScriptedServer(done(2), done(0), done(1), End()))
    assert [(c.key, c.token_ids, c.request_id, c.server) for c in answers] == [
        ((1, 0, 0), [2], "x-2", "http://scripted"),
        ((0, 0, 0), [0], "x-0", "http://scripted"),
        ((0, 0, 1), [1], "x-1", "http://scripted"),
    ]


async def test_a_prompt_is_sent_once_for_all_its_completions_but_never_for_another_ranks():
    server = ScriptedServer(*ALL, End())
    await ask(server, sampling=Sampling(max_tokens=3), priority=2)
    request = server.request
    assert [codec.to_ints(prompt) for prompt in request.prompts] == [[1], [2]]
    assert [(wanted.prompt, wanted.seed) for wanted in request.wanted] == [(0, 7), (0, 8), (1, None)]
    assert (request.sampling, request.priority) == ({"max_tokens": 3}, 2)


async def test_a_refusal_is_the_prompts_own_and_a_failure_is_for_another_try():
    refused, broken, *_ = await ask(
        ScriptedServer(Failed(2, 400, "is too long", 16), Failed(1, 503, "no"), ALL[0], End())
    )
    assert refused.key == (1, 0, 0)
    assert (type(refused.error), refused.error.index, refused.error.limit) == (PromptError, 0, 16)
    request, error = broken
    assert request is REQUESTS[1]
    assert (type(error), error.status, error.retryable) == (ServerError, 503, True)


@pytest.mark.fault(
    point="the batch route, seen by its client",
    did="A stream of frames ends without its last frame",
    happens="The call fails and can be repeated",
    within=20,
)
async def test_an_answer_without_its_end_was_cut_off():
    with pytest.raises(ServerError, match="cut off") as caught:
        await ask(ScriptedServer(done(0)))
    assert caught.value.retryable


async def test_an_end_before_every_request_was_answered_is_no_end():
    with pytest.raises(ServerError, match="cut off"):
        await ask(ScriptedServer(*ALL[:2], End()))


@pytest.mark.parametrize(
    "frames", [(ALL[0], ALL[0]), (done(3),), (done(-1),), (ALL[1], Failed(1, 400, "no")), (Failed(-3, 503, "no"),)]
)
async def test_an_answer_that_nobody_waits_for_is_refused(frames):
    with pytest.raises(ValueError, match="nothing was asked"):  # HttpClient makes a ServerError of it
        await ask(ScriptedServer(*frames, *ALL, End()))


async def test_new_tokens_are_progress_and_a_heartbeat_is_none():
    counted, watched = [], []
    for frames in ((Alive(1, 0),), (Alive(1, 0), Alive(1, 3)), (Alive(1, 3), Alive(1, 3), Alive(1, 4)), (Alive(1),)):
        moves = []
        server = ScriptedServer(*frames, *ALL, End())
        await ask(server, on_progress=lambda moves=moves: moves.append(1))
        counted.append(len(moves))
        watched.append(server.signs - len(ALL))
    assert counted == [0, 1, 2, 1]  # the word of an engine that does not count tokens is taken
    assert watched == [0, 1, 2, 0]  # and its health is asked
