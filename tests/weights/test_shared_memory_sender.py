"""The trainer's half of the shared-memory transfer, before a client that looks into the memory itself."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch

from vgen import WeightSyncError
from vgen.weights import shared_memory
from vgen.weights.buckets import LEFT_OPEN
from vgen.weights.shared_memory import SharedMemoryTransfer


class Worker:
    """Maps what it is told of and copies the tensors out, as slowly as `seconds` says."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.raises: dict[str, Exception] = {}
        self.sizes: list[int] = []
        self.seconds = 0.0
        self.modes: set[int] = set()
        self._files: dict[str, int] = {}

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._called("init")
        for path in init_info["paths"]:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDWR)
                self.modes.add(stat.S_IMODE(os.stat(path).st_mode))

    def start_weight_update(self) -> None:
        self._called("start")
        self.weights = {}

    def update_weights(self, update_info: dict) -> None:
        self._called("abort" if update_info.get("abort") else "last" if update_info["last"] else "update")
        if update_info.get("abort"):
            return
        time.sleep(self.seconds)
        file = self._files[update_info["path"]]
        memory = mmap.mmap(file, os.fstat(file).st_size)
        self.sizes.append(sum(prod(shape) * getattr(torch, t).itemsize for _, t, shape, _ in update_info["tensors"]))
        for name, dtype, shape, offset in update_info["tensors"]:
            count = prod(shape) * getattr(torch, dtype).itemsize
            flat = torch.frombuffer(bytearray(memory[offset : offset + count] or b"\0"), dtype=torch.uint8)[:count]
            self.weights[name] = flat.clone().view(getattr(torch, dtype)).view(shape)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._called(f"finish {weight_version}")

    def forget(self) -> None:
        self._files.clear()

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if error := self.raises.pop(call, None):
            raise error


class Weights:
    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()


def same(worker: Worker, weights: Weights) -> bool:
    return worker.weights.keys() == weights.tensors.keys() and all(
        torch.equal(worker.weights[name], tensor) and worker.weights[name].dtype == tensor.dtype
        for name, tensor in weights.tensors.items()
    )


def numbers(count: int, size: int = 1000) -> Weights:
    return Weights(**{f"w{i}": torch.randn(size) for i in range(count)})


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_every_bit_of_every_dtype_and_shape_arrives(worker, tmp_path, bucket_bytes):
    weights = Weights(
        bf16=torch.randn(7, 3).bfloat16(),
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 4),
        f64=torch.randn(5, dtype=torch.float64),
        transposed=torch.randn(4, 6).t(),
        fp8=torch.randn(9).to(torch.float8_e4m3fn),
        i64=torch.arange(11),
        boolean=torch.tensor([True, False]),
        f32=torch.randn(2, 3, 4),
    )
    transfer = SharedMemoryTransfer(worker, bucket_bytes=bucket_bytes, directory=tmp_path)
    for version in ("1", "2"):
        transfer.send(weights, version)
        fp8 = worker.weights.pop("fp8")
        assert torch.equal(fp8.view(torch.uint8), weights.tensors["fp8"].view(torch.uint8))
        assert same(worker, Weights(**{k: v for k, v in weights.tensors.items() if k != "fp8"}))
        assert worker.calls[-2:] == ["last", f"finish {version}"]


def test_buckets_are_bounded_and_two_are_in_flight(worker, tmp_path):
    weights = numbers(20)
    worker.seconds = 0.05
    given: list[float] = []

    class Timed(Weights):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for pair in super().__iter__():
                given.append(time.monotonic())
                yield pair

    transfer = SharedMemoryTransfer(worker, bucket_bytes=8192, directory=tmp_path)
    transfer.send(Timed(**weights.tensors))
    assert same(worker, weights)
    assert worker.sizes == [8000] * 10
    assert transfer.buckets_sent == 10
    # two buckets are filled before the first has been loaded, and no third
    assert given[4] - given[0] < 0.05 <= given[5] - given[0]


def test_a_tensor_larger_than_a_bucket_gets_one_of_its_size(worker, tmp_path):
    weights = Weights(a=torch.randn(10), big=torch.randn(10_000), b=torch.randn(10))
    transfer = SharedMemoryTransfer(worker, bucket_bytes=100, directory=tmp_path)
    transfer.send(weights)
    transfer.send(weights)
    assert same(worker, weights)
    assert worker.sizes == [40, 40_000, 40] * 2


def test_an_empty_source_is_an_empty_last_bucket(worker, tmp_path):
    SharedMemoryTransfer(worker, directory=tmp_path).send([])
    assert worker.calls == ["init", "start", "last", "finish None"]


def test_files_are_private_and_have_no_name_once_they_are_known(worker, tmp_path):
    place = tmp_path / "made" / "on" / "demand"

    class Look(Weights):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            assert list(place.iterdir()) == []
            yield from super().__iter__()

    transfer = SharedMemoryTransfer(worker, directory=place)
    transfer.send(Look(a=torch.ones(3)))
    assert worker.modes == {0o600}
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


@pytest.mark.parametrize("call", ["init", "start", "update", "last", "finish 7"])
def test_a_client_that_fails_leaves_nothing_behind_and_the_next_send_begins_anew(worker, tmp_path, call):
    weights = numbers(5)
    transfer = SharedMemoryTransfer(worker, bucket_bytes=4096, directory=tmp_path)
    worker.raises[call] = ConnectionError("the line is dead")
    with pytest.raises(WeightSyncError, match="the line is dead") as caught:
        transfer.send(weights, "7")
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert list(tmp_path.iterdir()) == []
    # where an update is under way, and only there, it is ended
    assert ("abort" in worker.calls) is (call in ("update", "last"))
    transfer.send(weights, "8")
    assert same(worker, weights)


def test_the_workers_words_become_a_typed_error(worker, tmp_path):
    said = WeightSyncError("AssertionError: it", phase="load", parameter="a.b", receiver="server")
    answer = f"500: Worker failed with error '{said}', please check the stack trace above for the root cause"
    worker.raises["last"] = RuntimeError(answer)
    with pytest.raises(WeightSyncError) as caught:
        SharedMemoryTransfer(worker, directory=tmp_path).send(numbers(1))
    assert (caught.value.phase, caught.value.parameter, caught.value.receiver) == ("load", "a.b", "server")
    assert str(caught.value).endswith("'a.b': AssertionError: it")


@pytest.mark.parametrize("error", [WeightSyncError("x", phase="gather"), KeyboardInterrupt(), SystemExit(1)])
def test_what_a_source_raises_goes_through_unchanged_after_the_update_is_ended(worker, tmp_path, error):
    class Breaks(Weights):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield "a", torch.ones(3)
            raise error

    threads = threading.active_count()
    with pytest.raises(type(error)) as caught:
        SharedMemoryTransfer(worker, directory=tmp_path).send(Breaks())
    assert caught.value is error
    assert worker.calls == ["init", "start", "abort", "finish None"]
    assert threading.active_count() == threads


def test_an_update_left_open_is_ended_first(worker, tmp_path):
    worker.raises["init"] = RuntimeError(f"500: {LEFT_OPEN}")
    SharedMemoryTransfer(worker, directory=tmp_path).send([])
    assert worker.calls == ["init", "abort", "finish None", "init", "start", "last", "finish None"]


def test_a_server_that_was_started_anew_is_given_new_buckets(worker, tmp_path):
    weights = numbers(3)
    transfer = SharedMemoryTransfer(worker, directory=tmp_path)
    transfer.send(weights)
    worker.forget()
    transfer.send(weights)
    assert same(worker, weights)


def test_full_memory_is_an_error_that_says_so(worker, tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_memory.os, "posix_fallocate", full)
    with pytest.raises(WeightSyncError, match=r"no room for it.*No space left.*bucket_bytes") as caught:
        SharedMemoryTransfer(worker, directory=tmp_path).send(numbers(1))
    assert caught.value.parameter == "w0"


def test_a_directory_of_somebody_elses_making_is_refused(worker, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(WeightSyncError, match="not a directory of this user's own"):
        SharedMemoryTransfer(worker, directory=tmp_path / "link").send([])
    with pytest.raises(ValueError, match="bucket_bytes"):
        SharedMemoryTransfer(worker, bucket_bytes=0)


DIES = """
import os, signal, sys, torch
from vgen.weights.shared_memory import SharedMemoryTransfer
class Client:
    def init_weight_transfer_engine(self, init_info): {at_init}
    def start_weight_update(self): os.kill(os.getpid(), signal.SIGKILL)
SharedMemoryTransfer(Client(), directory=sys.argv[1]).send([("a", torch.ones(3))])
"""


def test_a_killed_trainer_leaves_nothing_or_what_the_next_one_clears(worker, tmp_path):
    def die(at_init: str) -> None:
        code = DIES.format(at_init=at_init)
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL

    die("pass")
    assert list(tmp_path.iterdir()) == []
    die("os.kill(os.getpid(), signal.SIGKILL)")  # before the server has answered
    left = list(tmp_path.iterdir())
    assert len(left) == 2
    transfer = SharedMemoryTransfer(worker, directory=tmp_path)
    transfer.send([])
    assert list(tmp_path.iterdir()) == left  # they might be a trainer's that has only just begun
    for path in left:
        os.utime(path, (0, 0))
    held = shared_memory._Bucket(tmp_path, 10)
    os.utime(held.path, (0, 0))
    SharedMemoryTransfer(worker, directory=tmp_path).send([])
    assert list(tmp_path.iterdir()) == [Path(held.path)]  # its owner lives
