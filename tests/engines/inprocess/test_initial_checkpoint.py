"""What an engine starts from: the configuration of the model as it is now, and the files around it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from vgen.engines.inprocess.initial_checkpoint import checkpoint_of, frozen_checkpoint, stored_dtype


class Config:
    """Of a model, as transformers has it."""

    def __init__(self, path: str = "", **fields: Any) -> None:
        self._name_or_path, self.fields = path, fields

    def to_json_string(self) -> str:
        return json.dumps(self.fields)


class Model(torch.nn.Module):
    def __init__(self, config: Config, **generation: Any) -> None:
        super().__init__()
        self.config, self.name_or_path = config, config._name_or_path
        if generation:
            self.generation_config = SimpleNamespace(**generation)


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint's folder."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "preprocessor_config.json"):
        (tmp_path / name).write_text('"old"')
    for name in ("modeling_x.py", "model.safetensors", "optimizer.pt", "params.json", "hf_quant_config.json"):
        (tmp_path / name).write_text("old")
    return tmp_path


def contents(checkpoint: Any, name: str) -> Any:
    return json.loads(Path(checkpoint.path, name).read_text())


def tokenizer() -> Any:
    return SimpleNamespace(save_pretrained=lambda folder: Path(folder, "tokenizer.json").write_text('"new"'))


def test_the_configuration_is_the_models_own_and_the_rest_is_linked(saved):
    model = Model(Config(str(saved), vocab_size=300, architectures=["Model"]))
    checkpoint = checkpoint_of(model, None)
    assert contents(checkpoint, "config.json") == {"vocab_size": 300, "architectures": ["Model"]}
    assert checkpoint.tokenizer == checkpoint.path
    files = {file.name for file in Path(checkpoint.path).iterdir()}
    assert files >= {"tokenizer.json", "vocab.json", "preprocessor_config.json", "modeling_x.py"}
    assert not files & {"model.safetensors", "optimizer.pt", "params.json", "hf_quant_config.json"}
    assert checkpoint.folder is not None
    checkpoint.folder.cleanup()
    assert (saved / "tokenizer.json").read_text() == '"old"'


def test_the_live_tokenizer_replaces_all_files_of_the_old_one(saved):
    checkpoint = checkpoint_of(Model(Config(str(saved))), tokenizer())
    assert contents(checkpoint, "tokenizer.json") == "new"
    assert not Path(checkpoint.path, "vocab.json").exists()
    assert contents(checkpoint, "preprocessor_config.json") == "old"
    assert (saved / "tokenizer.json").read_text() == '"old"'


def test_only_the_special_tokens_of_the_live_generation_config_are_taken(saved):
    model = Model(Config(str(saved)), eos_token_id=torch.tensor([256, 7]), bos_token_id=None, repetition_penalty=3.0)
    assert contents(checkpoint_of(model, None), "generation_config.json") == {"eos_token_id": [256, 7]}


def test_a_relative_path_stays_the_folder_that_it_was(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    checkpoint = checkpoint_of(Model(Config(saved.name)), None)
    monkeypatch.chdir("/")
    assert contents(checkpoint, "tokenizer.json") == "old"


@pytest.mark.parametrize("path", ["", "/gone/away", "my-model", "not a name of a repository"])
def test_a_model_that_was_never_saved_needs_no_checkpoint(path):
    checkpoint = checkpoint_of(Model(Config(path, size=3)), None)
    assert contents(checkpoint, "config.json") == {"size": 3, "architectures": ["Model"]}
    assert checkpoint.tokenizer is None
    assert checkpoint_of(Model(Config(path)), tokenizer()).tokenizer is not None


def test_a_hub_name_stands_for_its_folder_in_the_cache(saved, monkeypatch):
    asked = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = Config("Qwen/Qwen3-0.6B")
    config._commit_hash = "abc"  # pyright: ignore[reportAttributeAccessIssue]
    assert checkpoint_of(Model(config), None).tokenizer is not None
    assert asked == [("Qwen/Qwen3-0.6B", {"revision": "abc", "local_files_only": True})]


def test_a_tokenizer_that_is_not_in_the_cache_is_downloaded_if_the_hub_answers(saved, monkeypatch):
    (saved / "tokenizer.json").unlink()
    (saved / "vocab.json").unlink()

    def snapshot_download(name: str, *, local_files_only: bool = False, **options: Any) -> str:
        if not local_files_only:
            if not online:
                raise ConnectionError
            assert "*.safetensors" in options["ignore_patterns"]
            (saved / "tokenizer.json").write_text('"new"')
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    online = False
    assert checkpoint_of(Model(Config("a/name")), None).tokenizer is None
    online = True
    assert checkpoint_of(Model(Config("a/name")), None).tokenizer is not None


def test_a_quantized_model_starts_from_its_config_without_quantization(saved):
    config = Config(str(saved), architectures=["Model"], quantization_config={"bits": 4})
    assert contents(checkpoint_of(Model(config), None), "config.json") == {"architectures": ["Model"]}


def test_layers_that_were_taken_off_are_taken_off_the_lists_of_layers():
    text = {"num_hidden_layers": 1, "layer_types": ["full_attention", "sliding_attention"]}
    checkpoint = checkpoint_of(Model(Config(**text, text_config=text)), None)
    assert contents(checkpoint, "config.json")["layer_types"] == ["full_attention"]
    assert contents(checkpoint, "config.json")["text_config"]["layer_types"] == ["full_attention"]


def test_routing_that_transformers_has_no_fields_for_is_told_to_vllm():
    fields = contents(
        checkpoint_of(Model(Config(model_type="deepseek_v3", architectures=["Model"])), None), "config.json"
    )
    assert (fields["topk_method"], fields["scoring_func"]) == ("noaux_tc", "sigmoid")
    config = Config(model_type="deepseek_v3", architectures=["Model"], scoring_func="softmax")
    assert contents(checkpoint_of(Model(config), None), "config.json")["scoring_func"] == "softmax"


def test_the_architecture_is_a_class_of_the_model():
    class FSDPModule:
        pass

    class FSDPModel(FSDPModule, Model):
        """As FSDP2 makes it."""

    class Users(Model):
        pass

    for kind, before in ((FSDPModel, None), (Users, ["Model"]), (Model, ["ModelWithAHead"])):
        checkpoint = checkpoint_of(kind(Config(architectures=before)), None)
        assert contents(checkpoint, "config.json")["architectures"] == ["Model"]


def test_weights_are_linked_on_request(saved):
    checkpoint = checkpoint_of(Model(Config(str(saved))), None, weights=saved)
    assert Path(checkpoint.path, "model.safetensors").resolve() == saved / "model.safetensors"
    assert not Path(checkpoint.path, "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ('{"dtype": "float32"}', "float32"),
        ('{"torch_dtype": "bfloat16"}', "bfloat16"),
        ('{"text_config": {"dtype": "float32"}}', "float32"),
        ("{}", "auto"),
        ("no json", "auto"),
    ],
)
def test_a_frozen_engine_has_the_dtype_of_its_checkpoint(tmp_path, config, dtype):
    (tmp_path / "config.json").write_text(config)
    assert stored_dtype(str(tmp_path)) == dtype
    assert stored_dtype("/gone/away") == "auto"


def test_a_frozen_engine_starts_from_the_checkpoint_itself(saved, tmp_path_factory):
    assert frozen_checkpoint(str(saved)).tokenizer == str(saved)
    bare = str(tmp_path_factory.mktemp("bare"))
    assert (frozen_checkpoint(bare).path, frozen_checkpoint(bare).tokenizer) == (bare, None)
    assert frozen_checkpoint("a/name").tokenizer == "a/name"
