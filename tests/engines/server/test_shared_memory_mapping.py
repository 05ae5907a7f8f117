"""What a worker opens of what a trainer names, and what it reads of it."""

from __future__ import annotations

import os

import pytest
import torch

from vgen import WeightSyncError
from vgen.engines.server.shared_memory_mapping import MappedFile, SharedMemoryMappings, tensors_in
from vgen.weights.transports.shared_memory import DIRECTORY_VARIABLE


@pytest.fixture
def directory(tmp_path, monkeypatch):
    place = tmp_path / "shared"
    place.mkdir()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(place))
    return place


def test_only_plain_files_in_the_directory_are_opened(directory, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(10))
    (directory / "link").symlink_to(secret)
    os.mkfifo(directory / "pipe")
    for path, says in (
        (secret, "only in"),
        (directory / ".." / "secret", "only in"),
        (directory / "link", "cannot open"),
        (directory / "missing", "cannot open"),
        (directory / "pipe", "plain file"),
    ):
        with pytest.raises(WeightSyncError, match=says) as caught:
            MappedFile(str(path))
        assert (caught.value.phase, caught.value.receiver) == ("load", "server")


def test_a_file_that_has_grown_is_mapped_again_also_without_its_name(directory):
    path = directory / "bucket"
    path.write_bytes(b"\1" * 100)
    mappings = SharedMemoryMappings()
    assert mappings.open(str(path)).memory().tolist() == [1] * 100
    with path.open("ab") as file:
        file.write(b"\2" * 100)
    path.unlink()
    assert mappings.open(str(path)).memory().tolist() == [1] * 100 + [2] * 100
    mappings.close()
    with pytest.raises(WeightSyncError, match="cannot open"):
        mappings.open(str(path))


def test_the_files_of_an_earlier_trainer_are_unmapped(directory):
    mappings = SharedMemoryMappings()
    paths = [directory / name for name in ("one", "two", "three")]
    for path in paths:
        path.write_bytes(b"")
        assert mappings.open(str(path)).memory().numel() == 0
        path.unlink()
    mappings.open(str(paths[1]))
    with pytest.raises(WeightSyncError):
        mappings.open(str(paths[0]))


def test_tensors_are_views_of_the_bucket_and_stay_within_it():
    memory = torch.arange(8, dtype=torch.float32).view(torch.uint8)
    entries = [("a", "float32", [2, 2], 0), ("b", "int32", [], 16), ("c", "bfloat16", [0, 4], 32)]
    (_, a), (_, b), (_, c) = tensors_in(memory, entries)
    assert (a.tolist(), b.shape, c.shape) == ([[0.0, 1.0], [2.0, 3.0]], (), (0, 4))
    memory[:4] = torch.tensor([9.0]).view(torch.uint8)
    assert a[0, 0] == 9.0
    for wrong in (
        ("w", "float32", [10**9, 10**9], 0),
        ("w", "float32", [2], 28),
        ("w", "float32", [-1], 0),
        ("w", "float32", [1], -4),
        ("w", "load", [1], 0),
    ):
        with pytest.raises(WeightSyncError) as caught:
            list(tensors_in(memory, [wrong]))
        assert caught.value.parameter == "w"
