"""The client of a real server: a stopped core, a sleep among requests, adapters whose folders change."""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
import signal
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.waiting import wait_until

from vgen import (
    ColocateGeneration,
    EngineState,
    EngineStateError,
    Generation,
    LoRARequest,
    Sampling,
    ServerConnection,
    ServerError,
    ServerGeneration,
)
from vgen.demo import max_logprob_difference
from vgen.testing import tiny_model

pytestmark = pytest.mark.slow  # these tests start engines

LONG = Sampling(max_tokens=480, ignore_eos=True)
MANY = 256
"""So many completions take a server on a CPU long enough to be seen at work."""
SHORT = Sampling(max_tokens=8, ignore_eos=True)
IN_OPEN = 0x20


@pytest.fixture(scope="module")
def generation(server) -> Iterator[ServerGeneration]:
    with ServerGeneration(
        server.model,
        base_urls=server.base_url,
        api_key=server.api_key,
        control_key=server.control_key,
        connection=ServerConnection(timeout=600.0),
    ) as made:
        made.sync_weights()
        yield made


@pytest.mark.parametrize(
    ("stopped", "reason"),
    [("core", "the engine is stopped"), ("API server", "GET /health was not answered within 5 s")],
    ids=["core", "API server"],
)
def test_a_process_that_is_stopped_ends_the_calls_that_wait_and_goes_on_later(server, generation, stopped, reason):
    (core,) = [process for process in server.processes() if "EngineCore" in process.name()]
    process = core if stopped == "core" else core.parent()
    with ThreadPoolExecutor() as pool:
        flight = pool.submit(generation.generate, [[1, 2, 3]] * MANY, LONG)
        wait_until(lambda: flight.done() or running(server) > 0, 60)
        assert not flight.done(), flight.exception() or "it was over before it was seen"
        process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        try:
            with pytest.raises(ServerError, match=reason):
                flight.result(60)
            assert time.monotonic() - begun < 30
        finally:
            process.send_signal(signal.SIGCONT)
    wait_until(lambda: server.call("/health")[0] == 200, 30)
    assert max_logprob_difference(server.model, generation.generate([[4, 5, 6]], SHORT)) <= 1e-4


def metrics(server: Any) -> str:
    return str(server.done("/metrics"))


def running(server: Any) -> float:
    return sum(float(line.split()[-1]) for line in metrics(server).splitlines() if "num_requests_running{" in line)


def test_a_sleep_waits_for_requests_in_flight_and_is_refused_otherwise(server, generation):
    with ThreadPoolExecutor() as pool:
        flight = pool.submit(generation.generate, [[1, 2, 3]] * MANY, LONG)
        wait_until(lambda: flight.done() or running(server) > 0, 60)
        assert not flight.done(), flight.exception() or "it was over before it was seen"
        with pytest.raises(EngineStateError, match="generating for a call of another thread"):
            generation.sleep()
        generation.sleep(wait_seconds=120)
        assert generation.state is EngineState.ASLEEP
        assert {completion.finish_reason for completion in flight.result(1)} == {"length"}
    generation.wake_up()
    assert max_logprob_difference(server.model, generation.generate([[4, 5, 6]], SHORT)) <= 1e-4


# --- adapters --------------------------------------------------------------------------------------------------------


class Opened:
    """Counts, by inotify, how often the weights of adapters in a folder and in its new subfolders are opened."""

    def __init__(self, folder: Path) -> None:
        self.counts: dict[str, int] = {}
        """By folder."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init()
        self._folders = dict[int, Path]()
        self._watch(folder, 0x100 | 0x40000000)  # IN_CREATE | IN_ISDIR

    def _watch(self, folder: Path, mask: int) -> None:
        self._folders[self._libc.inotify_add_watch(self._file, str(folder).encode(), mask)] = folder

    def run(self) -> None:
        while raw := os.read(self._file, 1 << 16):
            while raw:
                watch, mask, _, length = struct.unpack_from("iIII", raw)
                name = raw[16 : 16 + length].rstrip(b"\0").decode()
                raw, folder = raw[16 + length :], self._folders[watch]
                if name == "stop":
                    return
                if mask & 0x100 and (folder / name).is_dir():
                    self._watch(folder / name, IN_OPEN)
                elif mask & IN_OPEN and name == "adapter_model.safetensors":
                    self.counts[folder.name] = self.counts.get(folder.name, 0) + 1


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, int]]:
    watch = Opened(folder)
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        yield watch.counts
    finally:
        (folder / "stop").mkdir()
        thread.join(30)


def adapter(model: Any, folder: Path, seed: int) -> Any:
    """A PEFT model on a copy of the model; its adapter is saved in `folder`."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = get_peft_model(copy.deepcopy(model), config).eval()
    adapted.save_pretrained(folder)
    return adapted


def asked(folder: Path, name: str = "policy") -> LoRARequest:
    return LoRARequest(lora_name=name, lora_path=str(folder))


@pytest.fixture(params=["servers", "in process"])
def place(request, tmp_path) -> Iterator[tuple[Generation, Any]]:
    """A generation object, and its trainer's model."""
    if request.param == "servers":
        yield request.getfixturevalue("generation"), request.getfixturevalue("server").model
        return
    model, _ = tiny_model(tmp_path / "model")
    lora = {"enable_lora": True, "max_lora_rank": 8, "kv_cache_memory_bytes": 32 << 20}
    with ColocateGeneration(model, max_model_length=256, engine_kwargs=lora) as made:
        yield made, model


def test_a_hundred_requests_read_an_adapter_once(place, tmp_path):
    generation, model = place
    folders = tmp_path / "adapters"
    folders.mkdir()
    with opened(folders) as counts:
        folder = folders / "policy"
        adapted = adapter(model, folder, 1)
        written = dict(counts)  # by the trainer
        for _ in range(100):
            rollouts = generation.generate([[1, 2, 3]], Sampling(max_tokens=1), lora_request=asked(folder))
        assert max_logprob_difference(adapted, rollouts) <= 1e-4
    read = {name: count - written.get(name, 0) for name, count in counts.items()}
    assert read.pop("policy") == 1
    assert sum(read.values()) <= 3  # the copy: written once, and opened by vLLM while it loads the adapter once


def test_a_folder_that_is_gone_changes_nothing_even_after_a_sync(place, tmp_path):
    generation, model = place
    folder = tmp_path / "policy"
    adapted = adapter(model, folder, 2)
    assert max_logprob_difference(adapted, generation.generate([[1, 2, 3]], SHORT, lora_request=asked(folder))) <= 1e-4
    shutil.rmtree(folder)
    generation.sync_weights()  # vLLM then reads adapters again
    assert max_logprob_difference(adapted, generation.generate([[1, 2, 3]], SHORT, lora_request=asked(folder))) <= 1e-4


def test_requests_in_flight_keep_their_version_while_others_are_loaded(server, generation, tmp_path):
    """Three versions for a server that holds two adapters: the first is evicted, and read again, while it samples."""
    folder, other = tmp_path / "policy", tmp_path / "other"
    first, elsewhere = adapter(server.model, folder, 3), adapter(server.model, other, 4)
    with ThreadPoolExecutor() as pool:
        flight = pool.submit(generation.generate, [[1, 2, 3]] * 4, LONG, lora_request=asked(folder))
        wait_until(lambda: flight.done() or running(server) > 0, 60)
        assert not flight.done(), flight.exception() or "it was over before it was seen"
        second = adapter(server.model, folder, 5)
        for adapted, request in ((second, asked(folder)), (elsewhere, asked(other, "other"))):
            rollouts = generation.generate([[7, 8]], SHORT, lora_request=request)
            assert max_logprob_difference(adapted, rollouts) <= 1e-4
        shutil.rmtree(folder)
        assert max_logprob_difference(first, flight.result(120)) <= 1e-3
