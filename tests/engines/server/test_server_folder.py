"""The folder of a server: who may read it, who deletes it, and what is left alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.waiting import wait_until

from vgen import EngineError
from vgen.engines.server import server_folder
from vgen.engines.server.server_folder import LOCKED, PREFIX, ServerFolder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_only_this_user_can_read_it_and_it_is_deleted_once(place):
    folder = ServerFolder()
    assert Path(folder.name).parent == place
    assert stat.S_IMODE(os.stat(folder.name).st_mode) == 0o700
    Path(folder.name, "control-key").write_text("key")
    for _ in range(2):
        folder.cleanup()
    assert list(place.iterdir()) == []


def test_one_that_was_dropped_is_deleted(place):
    ServerFolder()
    assert list(place.iterdir()) == []


def test_a_forked_child_does_not_delete_it(place):
    folder = ServerFolder()
    if (child := os.fork()) == 0:
        folder.cleanup()
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(folder.name, LOCKED).exists()
    folder.cleanup()


KILLED = """
import os, signal
from vgen.engines.server.server_folder import ServerFolder
folder = ServerFolder()
print(folder.name, flush=True)
input()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_one_deletes_what_a_killed_launcher_has_left_and_nothing_else(place):
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    others = [place / f"{PREFIX}of-another-program", place / "something-else"]
    for other in others:
        other.mkdir()
    (others[1] / LOCKED).touch()
    (place / f"{PREFIX}link").symlink_to(others[1])
    alive = ServerFolder()
    ServerFolder().cleanup()
    assert left.exists()  # its launcher lives

    process.communicate("\n")
    wait_until(lambda: process.returncode is not None)
    ServerFolder().cleanup()
    assert not left.exists()
    assert all(other.exists() for other in (*others, others[1] / LOCKED, place / f"{PREFIX}link", Path(alive.name)))
    alive.cleanup()


def test_what_another_host_has_left_in_a_shared_place_may_be_in_use(place, monkeypatch):
    for host, swept in (("another", False), (server_folder.this_host(), True)):
        left = place / f"{PREFIX}{host}"
        with monkeypatch.context() as there:
            there.setattr(server_folder, "this_host", lambda host=host: host)
            folder = ServerFolder()
            os.rename(folder.name, left)  # nothing here holds its lock: locks of directories stay on their host
            folder.cleanup()
        ServerFolder().cleanup()
        assert left.exists() is not swept


def test_without_a_place_for_temporary_files_the_error_names_what_to_set(monkeypatch):
    monkeypatch.setattr(tempfile, "_get_default_tempdir", no_place)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(EngineError, match=r"No usable temporary directory.*: set TMPDIR to"):
        ServerFolder()


def no_place() -> str:
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")


def test_a_place_that_has_become_read_only_is_the_same_error(monkeypatch, place):
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(EngineError, match="set TMPDIR to"):
        ServerFolder()
