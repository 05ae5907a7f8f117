"""What tells one state of an adapter's folder from another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vgen.engines.lora_adapters import AdapterCopy, fingerprint, is_newer


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    (made / "adapter_model.safetensors").write_bytes(b"1")
    (made / "optimizer.pt").write_bytes(b"large")
    return made


def test_a_folder_is_known_by_its_adapter_files(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("one")
    first = fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("another text")
    assert fingerprint(str(tmp_path)) == first
    os.utime(tmp_path / "adapter_config.json", ns=(1, 1))
    changed = fingerprint(str(tmp_path))
    assert changed != first
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    assert fingerprint(str(tmp_path)) != changed


def test_a_hub_name_is_known_by_the_name_alone():
    assert fingerprint("some/adapter") == ("some/adapter", ())


def test_a_copy_has_the_adapters_files_alone_and_stays_as_it_is(folder, tmp_path):
    copy = AdapterCopy(str(folder), tmp_path)
    assert copy.fingerprint == fingerprint(str(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"another")
    assert sorted(file.name for file in Path(copy.path).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert Path(copy.path, "adapter_model.safetensors").read_bytes() == b"1"
    assert Path(copy.path).parent == tmp_path
    assert Path(copy.path).stat().st_mode == folder.stat().st_mode  # a server may run as another user
    path = copy.path
    del copy
    assert not Path(path).exists()


@pytest.mark.fault(
    point="an adapter behind a server",
    did="The folder is rewritten while it is copied",
    happens="It is copied again",
    within=20,
)
def test_a_folder_that_is_written_to_meanwhile_is_copied_again(folder, tmp_path, monkeypatch):
    whole = shutil.copy
    writes = iter([b"22", b"333"])

    def copy_while_it_is_written(source, target):
        whole(source, target)
        if source.name == "adapter_model.safetensors" and (content := next(writes, None)):
            (folder / source.name).write_bytes(content)

    monkeypatch.setattr(shutil, "copy", copy_while_it_is_written)
    copy = AdapterCopy(str(folder), tmp_path)
    assert Path(copy.path, "adapter_model.safetensors").read_bytes() == b"333"
    assert copy.fingerprint == fingerprint(str(folder))


def test_what_is_no_folder_or_cannot_be_copied_is_left_where_it_is(folder, tmp_path, caplog):
    assert AdapterCopy("some/adapter", tmp_path).path == "some/adapter"
    assert not caplog.messages
    assert AdapterCopy(str(folder), tmp_path / "nowhere").path == str(folder)
    assert "is not copied (No such file or directory)" in caplog.text


def test_a_folder_that_is_gone_is_not_newer(folder, tmp_path):
    held = fingerprint(str(folder))
    assert not is_newer(fingerprint(str(folder)), held)
    assert is_newer(fingerprint("some/adapter"), held)
    os.utime(folder / "adapter_config.json", ns=(1, 1))
    assert is_newer(fingerprint(str(folder)), held)
    shutil.rmtree(folder)
    assert not is_newer(fingerprint(str(folder)), held)


def test_a_forked_child_leaves_the_copy_to_its_parent(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"1")
    copy = AdapterCopy(str(tmp_path / "adapter"), tmp_path)
    child = os.fork()
    if child == 0:
        copy.remove()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert Path(copy.path, "adapter_model.safetensors").read_bytes() == b"1"
    copy.remove()
    assert not Path(copy.path).exists()


def test_a_folder_that_is_being_replaced_is_copied_when_it_is_there_again(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    folder.mkdir()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(b"old")
    real, copied = shutil.copy, []

    def copying(source, target):
        copied.append(source)
        if len(copied) == 1:
            file.unlink()
            try:
                return real(source, target)
            finally:
                file.write_bytes(b"the new one")
        return real(source, target)

    monkeypatch.setattr(shutil, "copy", copying)
    copy = AdapterCopy(str(folder), tmp_path)
    assert Path(copy.path, file.name).read_bytes() == b"the new one"
    copy.remove()
