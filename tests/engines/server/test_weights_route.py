"""vgen's routes for a weight update, in front of an engine that refuses in any words."""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vgen import WeightSyncError
from vgen.engines.server import weights_route
from vgen.weights.transports.sync_errors import UNKNOWN_HANDLES, UPDATE_OPEN, to_text

pytest.importorskip("starlette")
BODY = {"update_info": {"table": "one"}, "weight_version": "7"}


class Engine:
    """vLLM's engine client. `fails` has the errors of its calls."""

    def __init__(self, **fails: Exception) -> None:
        self.calls: list[Any] = []
        self.fails = fails
        self.engine_core: Any = SimpleNamespace()

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self._called("init", request.init_info)

    async def start_weight_update(self) -> None:
        self._called("start")

    async def update_weights(self, request: Any) -> None:
        self._called("update", request.update_info)

    async def finish_weight_update(self, weight_version: str | None) -> None:
        self._called("finish", weight_version)

    async def pause_generation(self, *, mode: str) -> None:
        self._called("pause", mode)

    def _called(self, call: str, *arguments: Any) -> None:
        self.calls.append((call, *arguments))
        if call in self.fails:
            raise self.fails[call]


@pytest.fixture(autouse=True)
def vllm(monkeypatch) -> None:
    """Of vLLM the two classes that the route makes."""
    request = SimpleNamespace(WeightTransferInitRequest=SimpleNamespace, WeightTransferUpdateRequest=SimpleNamespace)
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(base=request))


def post(route: Any, engine: Engine, body: Any = None, **query: str) -> tuple[int, Any]:
    async def raw() -> bytes:
        return json.dumps(body).encode()

    request = SimpleNamespace(
        body=raw, query_params=query, app=SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    )
    response = asyncio.run(route(request))
    return response.status_code, json.loads(response.body)


def worker_error(reason: str | None, words: str) -> RuntimeError:
    error = WeightSyncError(words, phase="transfer", receiver="server", reason=reason)
    return RuntimeError(f"Worker failed with error '{to_text(error)}', please check the stack trace above")


def test_a_whole_update_with_and_without_an_introduction():
    engine = Engine()
    assert post(weights_route.update_in_one_call, engine, BODY) == (200, {"weight_version": "7"})
    assert engine.calls == [("start",), ("update", {"table": "one"}), ("finish", "7")]
    engine.calls.clear()
    post(weights_route.update_in_one_call, engine, {**BODY, "init_info": {"table": {}}})
    assert engine.calls[0] == ("init", {"table": {}})


@pytest.mark.parametrize("words", ["as today", "in 'other' \"words\"", ""])
@pytest.mark.parametrize(
    ("reason", "status"), [(UNKNOWN_HANDLES, 409), (UPDATE_OPEN, 500), (None, 500)], ids=["unknown", "open", "other"]
)
def test_the_status_follows_the_code_of_the_workers_error_and_not_its_words(reason, status, words):
    answered, body = post(weights_route.update_in_one_call, Engine(update=worker_error(reason, words)), BODY)
    assert (answered, body["error"]["code"], body["error"]["reason"]) == (status, status, reason)


def test_words_alone_are_no_code():
    answered, body = post(weights_route.update_in_one_call, Engine(update=RuntimeError(UNKNOWN_HANDLES)), BODY)
    assert (answered, body["error"]["reason"], body["error"]["message"]) == (500, None, UNKNOWN_HANDLES)
    assert post(weights_route.update_in_one_call, Engine(update=EOFError()), BODY)[1]["error"]["message"] == "EOFError"


@pytest.mark.parametrize("words", ["a weight update is already active", "whatever a later vLLM says"])
def test_whether_an_update_is_open_is_asked_of_the_worker_when_vllm_refuses_to_start(words):
    refuses = Engine(start=RuntimeError(words), init=worker_error(UPDATE_OPEN, "an earlier update was not finished"))
    status, body = post(weights_route.update_in_one_call, refuses, BODY)
    assert (status, body["error"]["reason"]) == (500, UPDATE_OPEN)
    assert refuses.calls == [("start",), ("init", {})]
    another = Engine(start=RuntimeError(words))  # it has another reason to refuse
    status, body = post(weights_route.update_in_one_call, another, BODY)
    assert (status, body["error"]["reason"], body["error"]["message"]) == (500, None, words)


@pytest.mark.parametrize("body", [None, [], {}, {"update_info": 1}, "text"])
def test_a_body_that_makes_no_sense_is_refused(body):
    engine = Engine()
    assert post(weights_route.update_in_one_call, engine, body)[0] == 400
    assert engine.calls == []


def test_a_pause_goes_to_the_engine_core_or_where_there_is_no_such_method_to_the_engine():
    engine, paused = Engine(), list[Any]()
    assert post(weights_route.pause, engine, mode="wait") == (200, {"status": "paused"})
    assert engine.calls == [("pause", "wait")]

    async def pause_scheduler_async(**arguments: Any) -> None:
        paused.append(arguments)

    engine.engine_core = SimpleNamespace(pause_scheduler_async=pause_scheduler_async)
    post(weights_route.pause, engine)
    assert paused == [{"mode": "keep", "clear_cache": True}]
    assert post(weights_route.pause, engine, mode="never")[0] == 400
