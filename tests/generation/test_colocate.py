"""What `ColocateGeneration` asks of vLLM. The real engine is in tests/real/test_colocate.py."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file

from vgen import ArgumentError, ColocateGeneration, EngineError, EngineStateError, WeightSyncError
from vgen.engines.inprocess import engine as inprocess
from vgen.profiling import ProfilingContext, semconv
from vgen.testing import FakeEngine, MemorySink

torch = pytest.importorskip("torch", reason="torch is not installed: it comes with the engine")


class Model(torch.nn.Module):
    """A trainer's model whose checkpoint is not on this host."""

    config = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(vocab_size=100),
        to_json_string=lambda: '{"vocab_size": 100, "architectures": ["Model"]}',
        _name_or_path="/gone/away",
    )

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, device=device))


@pytest.fixture
def engines(monkeypatch) -> list[dict[str, Any]]:
    """The arguments of each engine that was constructed."""
    arguments: list[dict[str, Any]] = []

    class Engine(FakeEngine):
        def __init__(self, path: str, **settings: Any) -> None:
            super().__init__()
            arguments.append({"path": path, **settings})

    monkeypatch.setattr(inprocess, "ColocateEngine", Engine)
    return arguments


def rank(index: int, count: int) -> Any:
    return SimpleNamespace(process_index=index, num_processes=count)


def test_vllm_gets_the_live_configuration_and_the_arguments_under_its_own_names(engines):
    model = Model()
    generation = ColocateGeneration(
        model, max_model_length=64, max_num_seqs=3, gpu_memory_utilization=0.5, weight_version="7"
    )
    (arguments,) = engines
    config = Path(arguments["path"], "config.json")
    assert json.loads(config.read_text()) == {"vocab_size": 100, "architectures": ["Model"]}
    assert (arguments["max_model_len"], arguments["max_num_seqs"]) == (64, 3)
    assert (arguments["gpu_memory_utilization"], arguments["weight_version"]) == (0.5, "7")
    assert (arguments["dtype"], arguments["served_model_name"]) == ("float32", "/gone/away")
    assert arguments["load_format"] == "dummy"  # the first generation syncs
    assert arguments["protected"] is model
    generation.close()
    assert not config.parent.exists()


@pytest.mark.parametrize("call", ["generate", "stream", "agenerate", "score"])
def test_the_first_generation_syncs_the_weights_under_the_present_version(engines, call):
    sink = MemorySink()
    with ColocateGeneration(Model(), weight_version="7", profiling=ProfilingContext([sink])) as generation:
        for _ in range(2):
            match call:
                case "stream":
                    list(generation.stream([[1, 2]]))
                case "agenerate":
                    asyncio.run(generation.agenerate([[1, 2]]))
                case "score":
                    generation.score([[1, 2]], [[3]])
                case _:
                    assert generation.generate([[1, 2]])[0].weight_version == "7"
    (sync,) = sink.named(semconv.WEIGHT_SYNC)
    assert sync.attributes[semconv.WEIGHT_VERSION] == "7"
    if call != "stream":  # its span is not current, because it would leak to the caller
        assert sink.named(semconv.GENERATE)[0].span_id == sync.parent_id


def test_a_sync_before_the_first_generation_is_enough(engines):
    sink = MemorySink()
    with ColocateGeneration(Model(), profiling=ProfilingContext([sink])) as generation:
        generation.sync_weights()
        generation.generate([[1, 2]])
    assert len(sink.named(semconv.WEIGHT_SYNC)) == 1


@pytest.mark.parametrize("equal", [True, False])
def test_a_checkpoint_with_the_models_weights_is_loaded_on_request(engines, tmp_path, equal):
    model = Model()
    (tmp_path / "config.json").touch()
    save_file({"weight": torch.ones(2) if equal else torch.zeros(2)}, tmp_path / "model.safetensors")
    model.name_or_path = str(tmp_path)  # pyright: ignore[reportAttributeAccessIssue]
    sink = MemorySink()
    options: Any = dict(initial_weights="checkpoint", profiling=ProfilingContext([sink]))
    with ColocateGeneration(model, **options) as generation:
        assert Path(engines[0]["path"], "model.safetensors").exists() == equal
        assert ("load_format" not in engines[0]) == equal
        generation.generate([[1, 2]])
    assert len(sink.named(semconv.WEIGHT_SYNC)) == (not equal)


def test_an_engine_that_loads_nothing_is_synced_all_the_same(engines, tmp_path):
    model = Model()
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    model.name_or_path = str(tmp_path)  # pyright: ignore[reportAttributeAccessIssue]
    sink = MemorySink()
    options: Any = dict(engine_kwargs={"load_format": "dummy"}, profiling=ProfilingContext([sink]))
    with ColocateGeneration(model, initial_weights="checkpoint", **options) as generation:
        generation.generate([[1, 2]])
    assert len(sink.named(semconv.WEIGHT_SYNC)) == 1


def test_a_frozen_engine_generates_and_scores_and_keeps_its_weights(engines, tmp_path):
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    sink = MemorySink()
    options: Any = dict(enable_sleep_mode=True, profiling=ProfilingContext([sink]))
    with ColocateGeneration(tmp_path, **options) as judge:
        assert (engines[0]["path"], engines[0]["protected"]) == (str(tmp_path), None)
        assert "load_format" not in engines[0]
        assert engines[0]["dtype"] == "float32"  # vLLM's own default is half of that
        assert len(judge.generate([[1, 2]])) == 1
        assert len(judge.score([[1, 2]], [[3]])) == 1
        for call in (judge.sync_weights, lambda: judge.sleep(level=2), lambda: setattr(judge, "source", Model())):
            with pytest.raises(EngineStateError, match=r"frozen: it was constructed without the trainer's model"):
                call()
        judge.sleep(level=1)
        judge.wake_up()
        assert len(judge.generate([[1, 2]])) == 1
    assert sink.named(semconv.WEIGHT_SYNC) == []
    assert tmp_path.exists()


def test_an_engine_that_would_move_experts_is_refused_unless_it_is_frozen(engines, tmp_path):
    with pytest.raises(EngineError, match="enable_eplb"):
        ColocateGeneration(Model(), engine_kwargs={"enable_eplb": True, "eplb_config": {"use_async": False}})
    assert engines == []
    ColocateGeneration(tmp_path, engine_kwargs={"enable_eplb": True}).close()


def test_an_engine_that_would_keep_keys_of_old_weights_is_refused_unless_it_is_frozen(engines, tmp_path):
    connector = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    with pytest.raises(EngineError, match="LMCacheConnectorV1 of kv_transfer_config"):
        ColocateGeneration(Model(), engine_kwargs={"kv_transfer_config": connector})
    assert engines == []
    ColocateGeneration(tmp_path, engine_kwargs={"kv_transfer_config": connector}).close()
    ColocateGeneration(Model(), engine_kwargs={"kv_offloading_size": 4.0}).close()


def test_a_model_without_data_or_without_a_config_is_refused(engines):
    with pytest.raises(WeightSyncError, match="meta device") as caught:
        ColocateGeneration(Model("meta"))
    assert caught.value.parameter == "weight"
    with pytest.raises(EngineError, match="Linear has no `config`"):
        ColocateGeneration(torch.nn.Linear(2, 2))
    assert engines == []


def test_a_start_that_fails_leaves_no_folder(monkeypatch):
    paths: list[str] = []

    def fail(path: str, **_: Any) -> None:
        paths.append(path)
        raise EngineError("no memory")

    monkeypatch.setattr(inprocess, "ColocateEngine", fail)
    fail.kind = "colocate"  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(EngineError, match="no memory"):
        ColocateGeneration(Model())
    assert not Path(paths[0]).exists()


def test_each_ranks_engine_has_its_own_seed_and_engine_kwargs_override_what_vgen_sets(engines):
    for index in range(2):
        ColocateGeneration(Model(), accelerator=rank(index, 2))
    ColocateGeneration(Model(), engine_kwargs={"seed": 42, "quantization": "fp8"})
    assert [arguments["seed"] for arguments in engines] == [0, 1, 42]
    assert engines[2]["quantization"] == "fp8"


def test_tensor_parallel_size_must_divide_the_ranks(engines):
    with pytest.raises(ValueError, match="tensor_parallel_size 2 must divide the 3 ranks"):
        ColocateGeneration(Model(), accelerator=rank(0, 3), tensor_parallel_size=2)
    assert engines == []


def test_sleep_mode_is_off_unless_it_is_asked_for(engines):
    assert engines == []
    generation = ColocateGeneration(Model())
    with pytest.raises(Exception, match="enable_sleep_mode=True"):
        generation.sleep()
    assert ColocateGeneration(Model(), enable_sleep_mode=True).sleep().seconds > 0


def test_an_unknown_keyword_is_refused_before_an_engine_starts(engines):
    with pytest.raises(ArgumentError, match=r"ColocateGeneration\(request_spans=\) is not an argument: it takes"):
        ColocateGeneration(Model(), request_spans=3)  # pyright: ignore[reportCallIssue]
    assert engines == []


@pytest.mark.parametrize(
    ("name", "least"), [("max_model_length", 2), ("max_num_seqs", 1), ("tensor_parallel_size", 1), ("drift_every", 1)]
)
def test_the_least_value_of_each_number_is_accepted_and_one_less_refused(engines, name, least):
    with pytest.raises(ArgumentError, match=name):
        ColocateGeneration(Model(), **{name: least - 1})
    ColocateGeneration(Model(), **{name: least}).close()


@pytest.mark.parametrize("share", [0, -0.1, 1.001, 1.5, float("nan")])
def test_a_share_of_the_device_memory_is_more_than_none_and_at_most_all(engines, share):
    with pytest.raises(ArgumentError, match="gpu_memory_utilization"):
        ColocateGeneration(Model(), gpu_memory_utilization=share)
    for right in (0.001, 1, 1.0):
        ColocateGeneration(Model(), gpu_memory_utilization=right).close()
    assert [arguments["gpu_memory_utilization"] for arguments in engines] == [0.001, 1.0, 1.0]
