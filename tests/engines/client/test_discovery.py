"""What a server is: whether it is vLLM, new enough, and holds the trainer's model."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from helpers.server_generation import Model, generation

from vgen import (
    EngineError,
    EngineStateError,
    ServerError,
    ServerGeneration,
)
from vgen.engines.client.discovery import discover
from vgen.engines.client.http import HttpClient
from vgen.engines.server.lease import LeaseBook
from vgen.engines.server.middleware import ControlMiddleware
from vgen.testing import FaultyServer


def test_a_wrong_address_and_a_server_that_is_not_vllm(server):
    server.faults["/v1/models"] = ["not vllm"]
    with pytest.raises(EngineError, match="is it one"):
        generation(server)
    server.faults["/v1/models"] = ["silent"]
    gone = FaultyServer()
    gone.close()
    with pytest.raises(ServerError, match="failed"):
        generation(gone)


def test_another_model_than_the_trainers_and_too_old_a_server_are_said_so(ours):
    ours.answers["/vgen/info"]["shape"] = {"hidden_size": 128}
    model = Model()
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100, hidden_size=256))
    with pytest.raises(EngineError, match=r"hidden_size of 128.*has 256"):
        ServerGeneration(model, base_urls=ours.url)
    with FaultyServer(vocabulary_size=272) as stock, pytest.raises(EngineError, match=r"vocab_size of 272.*has 100"):
        generation(stock)
    with FaultyServer(vocabulary_size=100) as stock:
        stock.answers["/collective_rpc"] = {"results": ["M()(\n (e): VocabParallelEmbedding(a=1, embedding_dim=128)\n"]}
        model = Model()
        model.get_input_embeddings = lambda: SimpleNamespace(embedding_dim=256)
        with pytest.raises(EngineError, match=r"embedding_dim of 128.*has 256.*start it with the trainer's model"):
            ServerGeneration(model, base_urls=stock.url)
    ours.answers["/version"] = {"version": "0.11.2+cpu"}
    with pytest.raises(EngineError, match=r"0\.11\.2.*0\.30 or newer"):
        generation(ours)


def test_a_server_that_asks_for_a_control_key_is_known_by_the_reason_of_its_refusal(caplog):
    """With its real middleware in front of a stand-in for vLLM, and without a control key."""

    async def vllm(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"data": [{"id": "tiny", "max_model_len": 64}]}'})

    guarded = ControlMiddleware(vllm, key="key", leases=LeaseBook())

    class Client(HttpClient):
        async def get(self, path, *, timeout=None):
            sent = []

            async def receive():
                return {"type": "http.request", "body": b""}

            async def send(message):
                sent.append(message)

            await guarded({"type": "http", "method": "GET", "path": path, "headers": []}, receive, send)
            answer, status = json.loads(sent[1]["body"]), sent[0]["status"]
            if status >= 300:
                error = answer["error"]
                raise ServerError("refused", url=self.name, status=status, reason=error["type"])
            return answer

        async def infer(self, path, body, headers, decode, timeout):
            raise ServerError("refused", url=self.name, status=400)

    endpoint = asyncio.run(discover(Client("http://server")))
    assert endpoint.features == {"batch"}
    assert (endpoint.controlled, endpoint.fix) == (False, "pass control_key")
    assert "asking for a control key" in caplog.text


def test_a_stock_server_says_what_it_can_do(caplog):
    with FaultyServer(vocabulary_size=100) as stock:
        config = stock.answers["/server_info"]["vllm_config"]
        config["scheduler_config"] = {"max_num_seqs": 7}
        config["weight_transfer_config"] = {"backend": "nccl"}
        config["model_config"] |= {"dtype": "torch.bfloat16", "logprobs_mode": "raw_logprobs"}
        stock.answers["/get_world_size"] = {"world_size": 4}
        with generation(stock) as made:
            (endpoint,) = made.engine.endpoints
    assert endpoint.stock
    assert (endpoint.max_num_seqs, endpoint.backend, endpoint.workers) == (7, "nccl", 4)
    assert (endpoint.dtype, endpoint.shape) == ("bfloat16", {"vocab_size": 100})
    assert "returns raw_logprobs" in caplog.text


def test_without_development_mode_it_only_generates(server, caplog):
    server.faults["/server_info"] = [404]
    with generation(server) as made:
        assert not made.engine.endpoints[0].controlled
        with pytest.raises(EngineStateError, match="VLLM_SERVER_DEV_MODE=1"):
            made.pause()
    assert "not in development mode" in caplog.text
