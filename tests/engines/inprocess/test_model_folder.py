"""Folders for engines: the same path at each start, one owner at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vgen import EngineError
from vgen.engines.inprocess.model_folder import ModelFolder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_path_is_the_same_at_the_next_start_and_empty():
    first = ModelFolder("abc")
    (first.path / "config.json").write_text("{}")
    first.cleanup()
    first.cleanup()
    assert not first.path.exists()
    second = ModelFolder("abc")
    assert second.path == first.path
    assert list(second.path.iterdir()) == []
    first.cleanup()  # it is no longer the first one's
    assert second.path.exists()
    second.cleanup()


def test_two_engines_at_a_time_have_two_folders_and_each_rank_its_own():
    folders = [ModelFolder("abc"), ModelFolder("abc"), ModelFolder("abc", 5), ModelFolder("def")]
    assert [folder.path.name for folder in folders] == ["abc-0", "abc-1", "abc-5", "def-0"]
    folders[0].cleanup()
    assert ModelFolder("abc").path == folders[0].path


@pytest.mark.fault(
    point="the engine in the trainer's process",
    did="A process was killed with its model folder",
    happens="The next start deletes it",
    within=60,
)
def test_what_a_killed_process_has_left_is_deleted(temporary):
    folder = ModelFolder("abc")
    path = folder.path
    folder.cleanup()
    (path / "sub").mkdir(parents=True)
    (temporary / "kept").write_text("weights")
    (path / "model.safetensors").symlink_to(temporary / "kept")
    assert list(ModelFolder("abc").path.iterdir()) == []
    assert (temporary / "kept").read_text() == "weights"


def test_where_others_may_write_the_path_is_random(temporary):
    first = ModelFolder("abc")
    first.path.parent.chmod(0o777)
    other = ModelFolder("abc")
    assert other.path.parent == temporary
    assert other.path.is_dir()
    other.cleanup()
    assert not other.path.exists()


def test_a_process_that_ends_without_closing_leaves_nothing_and_its_forked_children_delete_nothing():
    code = """if True:
        import os, sys
        from vgen.engines.inprocess.model_folder import ModelFolder
        folder = ModelFolder("abc")
        if not os.fork():
            sys.exit()
        os.wait()
        print(folder.path.exists(), folder.path)
    """
    environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    existed, path = done.stdout.split()
    assert existed == "True", done.stderr
    assert not Path(path).exists()


def test_where_no_folder_can_be_made_the_error_names_what_to_set(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(EngineError, match="set TMPDIR to"):
        ModelFolder("abc")
