"""A trainer is killed in the middle of a change to a real server: the next one generates, and right."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.waiting import wait_until

from vgen import EngineError, Sampling, ServerConnection, ServerError, ServerGeneration
from vgen.demo import max_logprob_difference

pytestmark = pytest.mark.slow  # these tests start a server

SAMPLING = Sampling(max_tokens=8, ignore_eos=True)
READY_SECONDS = 40.0
"""Within which the next trainer must have generated. The lease of the dead one lasts two seconds."""

TRAINER = """
import asyncio, json, os, signal, sys
import torch
from transformers import AutoModelForCausalLM
from vgen import ServerConnection, ServerGeneration, WeightSyncOptions
from vgen.engines.client import http, lease_holder

told = json.loads(sys.argv[1])
lease_holder.LEASE_SECONDS = 2.0
model = AutoModelForCausalLM.from_pretrained(told["folder"])
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
post, armed = http.HttpClient.post, False

async def post_and_die(self, path, *args, **kwargs):
    mine = armed and path.startswith(told["path"])
    if mine and told["when"] == "during":
        asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGKILL)
    answer = await post(self, path, *args, **kwargs)
    if mine and told["when"] == "hold":
        print("held", flush=True)
        await asyncio.sleep(600)
    if mine:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

http.HttpClient.post = post_and_die
generation = ServerGeneration(
    model,
    base_urls=told["url"],
    api_key=told["api_key"],
    control_key=told["control_key"],
    weight_sync=WeightSyncOptions(bucket_bytes=1 << 18),
    connection=ServerConnection(takeover=True),
)
generation.sync_weights(verify="none")
if told["call"] == "wake_up":
    generation.sleep()
armed = True
if told["call"] == "wake_up":
    generation.wake_up(["weights"])
elif told["call"] == "sleep":
    generation.sleep(2)
else:
    generation.sync_weights(verify="none")
raise SystemExit("it was not killed")
"""


def trainer(server: Any, call: str, path: str, when: str) -> subprocess.Popen[str]:
    keys = {"url": server.base_url, "api_key": server.api_key, "control_key": server.control_key}
    told = json.dumps({**keys, "folder": server.folder, "call": call, "path": path, "when": when})
    return subprocess.Popen([sys.executable, "-c", TRAINER, told], stdout=subprocess.PIPE, text=True)


def connection(server: Any) -> dict[str, Any]:
    return {
        "base_urls": server.base_url,
        "api_key": server.api_key,
        "control_key": server.control_key,
        "connection": ServerConnection(timeout=600.0),
    }


@contextmanager
def in_time(seconds: float = READY_SECONDS):
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


PHASES = [
    ("sync", "/vgen/pause", "after"),
    ("sync", "/init_weight_transfer_engine", "after"),
    ("sync", "/start_weight_update", "during"),
    ("sync", "/start_weight_update", "after"),
    ("sync", "/update_weights", "during"),
    ("sync", "/update_weights", "after"),
    ("sync", "/finish_weight_update", "during"),
    ("sync", "/finish_weight_update", "after"),
    ("sync", "/reset_mm_cache", "after"),
    ("sleep", "/sleep", "during"),
    ("sleep", "/sleep", "after"),
    ("wake_up", "/wake_up", "during"),
    ("wake_up", "/wake_up", "after"),
]


@pytest.mark.parametrize(("call", "path", "when"), PHASES)
def test_a_trainer_that_was_killed_leaves_a_server_that_the_next_one_restores(server, call, path, when):
    dead = trainer(server, call, path, when)
    assert dead.wait(120) == -signal.SIGKILL
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    with in_time(), ServerGeneration(server.model, **connection(server)) as generation:
        rollouts = generation.generate([[1, 2, 3]] * 4, SAMPLING)
        assert max_logprob_difference(server.model, rollouts) <= 1e-4
        generation.sleep()
        generation.wake_up()
        assert max_logprob_difference(server.model, generation.generate([[4, 5]], SAMPLING)) <= 1e-4


@pytest.mark.parametrize(("call", "path"), [("sync", "/start_weight_update"), ("sleep", "/sleep")])
def test_a_frozen_engine_whose_server_is_stopped_by_a_trainer_that_dies_raises(server, call, path):
    holding = trainer(server, call, path, "hold")
    try:
        assert holding.stdout is not None
        assert holding.stdout.readline() == "held\n"
        with ServerGeneration(None, **connection(server)) as judge:
            holding.send_signal(signal.SIGKILL)
            with in_time(), pytest.raises(ServerError, match=r"its trainer must call|the last weight update failed"):
                judge.generate([[1, 2, 3]], SAMPLING)
        wait_until(lambda: server.done("/vgen/info")["lease"] is None, 20)
        with pytest.raises(EngineError, match="its trainer must call"):
            ServerGeneration(None, **connection(server))
        with in_time(), ServerGeneration(server.model, **connection(server)) as generation:
            assert max_logprob_difference(server.model, generation.generate([[1, 2, 3]], SAMPLING)) <= 1e-4
    finally:
        holding.kill()
        holding.wait(20)
