"""What tells one state of an adapter's folder from another."""

from __future__ import annotations

import os

from vgen.engines.lora_adapters import fingerprint


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
