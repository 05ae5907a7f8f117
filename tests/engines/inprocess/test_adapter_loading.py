"""Adapters in a stand-in for vLLM's engine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vgen.engines.inprocess.adapter_loading import AdapterLoader
from vgen.types import LoRARequest


class Engine:
    def __init__(self):
        self.calls: list[tuple] = []
        self.vllm_config = SimpleNamespace(lora_config=object())
        self.llm_engine = self
        self.error: Exception | None = None

    def add_lora(self, request):
        if self.error:
            raise self.error
        self.calls.append(("add", request))

    def remove_lora(self, adapter_id):
        self.calls.append(("remove", adapter_id))

    def reset_prefix_cache(self, reset_connector):
        assert reset_connector
        self.calls.append(("reset",))


@pytest.fixture
def engine(monkeypatch):
    module = ModuleType("vllm.lora.request")
    module.LoRARequest = lambda name, adapter_id, path: (name, adapter_id, path)
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", module)
    return Engine()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    return tmp_path


def adapter(folder, name="a"):
    return LoRARequest(lora_name=name, lora_path=str(folder))


def test_none_is_no_adapter(engine):
    assert AdapterLoader(engine).load(None) is None
    assert engine.calls == []


def test_each_name_has_an_id_of_its_own_and_keeps_it(engine, folder):
    loader = AdapterLoader(engine)
    assert loader.load(adapter(folder))[:2] == ("a", 1)
    assert loader.load(adapter(folder, "b"))[:2] == ("b", 2)
    assert loader.load(adapter(folder))[:2] == ("a", 1)
    assert [call[0] for call in engine.calls] == ["add"] * 3  # again each time, so that vLLM does not evict it next


def test_a_folder_that_has_changed_replaces_the_adapter(engine, folder):
    loader = AdapterLoader(engine)
    first = loader.load(adapter(folder))
    os.utime(folder / "adapter_model.safetensors", ns=(1, 1))
    second = loader.load(adapter(folder))
    assert second[:2] == ("a", 2)
    assert engine.calls[1:] == [("add", second), ("remove", 1), ("reset",)]
    assert not Path(first[2]).exists()


def test_what_vllm_may_read_again_is_the_adapter_that_was_loaded(engine, folder):
    """After a weight sync, and when an adapter was evicted, it reads the files again."""
    loader = AdapterLoader(engine)
    loaded = loader.load(adapter(folder))
    shutil.rmtree(folder)
    assert loader.load(adapter(folder)) == loaded
    assert Path(loaded[2], "adapter_model.safetensors").read_bytes() == b"1"


@pytest.mark.fault(
    point="an adapter behind a server",
    did="An adapter cannot be loaded in process",
    happens="The error says what to do; the next call tries again",
    within=20,
)
def test_what_cannot_be_loaded_says_what_to_do_and_is_tried_again(engine, folder):
    loader = AdapterLoader(engine)
    with pytest.raises(ValueError, match="has no lora_path"):
        loader.load(LoRARequest(lora_name="a"))
    engine.error = ValueError("rank 64 is above max_lora_rank 16")
    with pytest.raises(ValueError, match=r"could not be loaded .*larger engine_kwargs=\{'max_lora_rank'"):
        loader.load(adapter(folder))
    engine.error = None
    assert loader.load(adapter(folder))[0] == "a"
    engine.vllm_config.lora_config = None
    with pytest.raises(ValueError, match="'enable_lora': True"):
        loader.load(adapter(folder))
