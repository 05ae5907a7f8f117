"""Files in shared memory: who may open them, and when they disappear."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.bucket_worker import Weights, Worker, numbers
from helpers.transfers import shared_memory

from vgen import WeightSyncError
from vgen.weights.transports import shared_memory as module


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_files_are_private_and_have_no_name_once_they_are_known(worker, tmp_path):
    place = tmp_path / "made" / "on" / "demand"

    class Look(Weights):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            assert list(place.iterdir()) == []
            yield from super().__iter__()

    transport = shared_memory(worker, directory=place)
    transport.replace_weights(Look(a=torch.ones(3)))
    assert worker.modes == {0o600}
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


@pytest.mark.fault(
    point="shared memory and folders for weights",
    did="/dev/shm is full",
    happens="`WeightSyncError` names the tensor and says what to do",
    within=20,
)
def test_full_memory_is_an_error_that_says_so(worker, tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(WeightSyncError, match=r"no room for it.*No space left.*bucket_bytes") as caught:
        shared_memory(worker, directory=tmp_path).replace_weights(numbers(1))
    assert caught.value.parameter == "w0"


@pytest.mark.fault(
    point="shared memory and folders for weights",
    did="The directory was made by another program",
    happens="It is refused; no file in it is touched",
    within=20,
)
def test_a_directory_of_somebody_elses_making_is_refused(worker, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(WeightSyncError, match="must be a directory that this user owns"):
        shared_memory(worker, directory=tmp_path / "link").replace_weights([])
    with pytest.raises(ValueError, match="bucket_bytes"):
        shared_memory(worker, bucket_bytes=0)


DIES = """
import os, signal, sys, torch
from vgen.weights.transports.shared_memory import SharedMemoryTransport
from vgen.weights.transports.weight_transport import TransportSettings
class Client:
    def init_weight_transfer_engine(self, init_info): {at_init}
    def start_weight_update(self): os.kill(os.getpid(), signal.SIGKILL)
transport = SharedMemoryTransport(TransportSettings(), directory=sys.argv[1])
transport.client = Client()
transport.replace_weights([("a", torch.ones(3))])
"""


@pytest.mark.fault(
    point="shared memory and folders for weights",
    did="The trainer is killed in a transfer",
    happens="The next trainer removes what it left",
    within=60,
)
def test_a_killed_trainer_leaves_nothing_or_what_the_next_one_clears(worker, tmp_path):
    def die(at_init: str) -> None:
        code = DIES.format(at_init=at_init)
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL

    die("pass")
    assert list(tmp_path.iterdir()) == []
    die("os.kill(os.getpid(), signal.SIGKILL)")  # before the server has answered
    left = list(tmp_path.iterdir())
    assert len(left) == 2
    transport = shared_memory(worker, directory=tmp_path)
    transport.replace_weights([])
    assert list(tmp_path.iterdir()) == left  # they might be a trainer's that has only just begun
    for path in left:
        os.utime(path, (0, 0))
    held = module.SharedMemoryBucket(tmp_path, 10)
    os.utime(held.path, (0, 0))
    shared_memory(worker, directory=tmp_path).replace_weights([])
    assert list(tmp_path.iterdir()) == [Path(held.path)]  # its owner lives


@pytest.mark.fault(
    point="shared memory and folders for weights",
    did="Other files lie in the directory",
    happens="They are never removed",
    within=20,
)
def test_what_is_not_named_as_a_bucket_is_never_removed(worker, tmp_path):
    names = [
        "precious.txt",
        "0" * 32,
        "vgen-bucket-precious",
        f"vgen-bucket-{'0' * 32}.txt",
        f"x-vgen-bucket-{'0' * 32}",
    ]
    kept = [tmp_path / name for name in names]
    stale = tmp_path / f"vgen-bucket-{'0' * 32}"
    for path in (*kept, stale):
        path.write_text("content")
        os.utime(path, (0, 0))
    shared_memory(worker, directory=tmp_path).replace_weights(numbers(1))
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_default_directory_that_vgen_did_not_make_is_refused(worker, tmp_path, monkeypatch):
    place = tmp_path / "default"
    place.mkdir()
    place.chmod(0o777)
    monkeypatch.setattr(module, "default_directory", lambda: place)
    monkeypatch.delenv(module.DIRECTORY_VARIABLE, raising=False)
    stale = place / f"vgen-bucket-{'0' * 32}"
    stale.write_text("content")
    os.utime(stale, (0, 0))
    with pytest.raises(WeightSyncError, match=r"vgen did not make .*VGEN_SHARED_MEMORY_DIR"):
        shared_memory(worker).replace_weights([])
    assert stale.exists()
    place.chmod(0o700)
    shared_memory(worker).replace_weights([])
    assert not stale.exists()


def test_a_file_is_closed_once(tmp_path, monkeypatch):
    """A second close would close what the process has opened under the number since."""
    bucket = module.SharedMemoryBucket(tmp_path, 64)
    closed, close = list[int](), os.close
    monkeypatch.setattr(module.os, "close", lambda number: (closed.append(number), close(number)))
    bucket.close()
    bucket.close()
    assert len(closed) == 1
