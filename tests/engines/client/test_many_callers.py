"""Hundreds of asynchronous calls at once: nothing is lost or doubled, and giving some up leaves the others right."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch

import vgen.generation.call_threads
from vgen import Sampling, ServerConnection, ServerGeneration
from vgen.testing import FaultyServer

MANY = 300
COMPLETIONS, BATCH = "/v1/completions", "/inference/vgen/generate"


class Model(torch.nn.Module):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=1000))

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))


def prompt(i: int) -> list[int]:
    return [1 + i, 2, 3]


def asked(server: FaultyServer, path: str) -> int:
    return len([1 for seen, _, _ in server.seen if seen == path])


def threads() -> int:
    return len([thread for thread in threading.enumerate() if thread.name.startswith("vgen-generate")])


@pytest.mark.parametrize(("features", "path"), [((), COMPLETIONS), (("batch", "lease"), BATCH)])
def test_hundreds_of_tasks_on_a_bounded_number_of_threads(monkeypatch, features, path):
    monkeypatch.setattr(vgen.generation.call_threads, "MOST_THREADS", 24)

    async def main(generation: ServerGeneration) -> list:
        tasks = [asyncio.create_task(generation.agenerate([prompt(i)], Sampling(max_tokens=3))) for i in range(MANY)]
        done = await asyncio.gather(*tasks)
        assert 0 < threads() - before <= 24
        return done

    before = threads()  # of generation objects that other tests have not closed

    with FaultyServer(features=features) as server, ServerGeneration(Model(), base_urls=server.url) as generation:
        found = asyncio.run(main(generation))
        assert [rollouts[0].token_ids for rollouts in found] == [prompt(i) for i in range(MANY)]
        assert asked(server, path) == MANY


def test_the_loop_goes_on_while_calls_wait_and_those_given_up_take_no_other_with_them():
    release = threading.Event()

    def held(body):
        release.wait(60)
        ids = body["prompt"]
        return {"id": "x", "choices": [{"index": 0, "token_ids": ids, "finish_reason": "stop"}]}

    async def main(generation: ServerGeneration, server: FaultyServer) -> list:
        sampling = Sampling(max_tokens=3, logprobs=None)
        tasks = [asyncio.create_task(generation.agenerate([prompt(i)], sampling)) for i in range(MANY)]
        async with asyncio.timeout(60):
            while asked(server, COMPLETIONS) < MANY:  # all are at the server, and this loop still runs
                await asyncio.sleep(0.02)
        for task in tasks[::3]:
            task.cancel()
        release.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with (
        FaultyServer() as server,
        ServerGeneration(Model(), base_urls=server.url, connection=ServerConnection(timeout=60.0)) as generation,
    ):
        server.faults[COMPLETIONS] = [held] * MANY
        found = asyncio.run(main(generation, server))
        assert all(isinstance(each, asyncio.CancelledError) for each in found[::3])
        kept = [i for i in range(MANY) if i % 3]
        assert [found[i][0].token_ids for i in kept] == [prompt(i) for i in kept]
        assert asked(server, COMPLETIONS) == MANY
        assert len(generation.generate([prompt(0)])) == 1


def test_tasks_that_find_another_trainers_weights_bring_their_own_once():
    pytest.importorskip("safetensors")

    together = threading.Barrier(50)

    class Ids(list):
        ndim = 1

        def tolist(self):  # all have found the engine awake, and its weights another's
            together.wait(60)
            return list(self)

    async def main(generation: ServerGeneration) -> list:
        return await asyncio.gather(*(generation.agenerate([Ids(prompt(i))]) for i in range(50)))

    with FaultyServer() as server:
        server.answers["/weight_info"] = {"weight_version": "step-7"}
        made = ServerGeneration(Model(), base_urls=server.url, connection=ServerConnection(timeout=60.0))
        with made as generation:
            found = asyncio.run(main(generation))
    assert [rollouts[0].token_ids for rollouts in found] == [prompt(i) for i in range(50)]
    order = [path.partition("?")[0] for path, _, _ in server.seen]
    assert order.count("/update_weight_version") == 1
    assert order.index("/resume") < order.index(COMPLETIONS)
