"""vgen's engine in a worker: which errors have which code. tests/real has what it loads, with a real engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vgen.weights.transports.shared_memory import DIRECTORY_VARIABLE
from vgen.weights.transports.sync_errors import UNKNOWN_HANDLES, UPDATE_OPEN, as_sync_error

pytestmark = pytest.mark.real
pytest.importorskip("vllm")


@pytest.fixture
def engine() -> Any:
    from vgen.engines.server.weight_receiver import VgenEngine

    parallel = SimpleNamespace(world_size=1, distributed_executor_backend="uni", data_parallel_index=0, rank=0)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    return VgenEngine(SimpleNamespace(), config, torch.device("cpu"), torch.nn.Linear(1, 1))  # pyright: ignore


def raised(call: Any, *arguments: Any) -> Any:
    """The `WeightSyncError` that a trainer makes of what the worker raises."""
    with pytest.raises(RuntimeError) as caught:
        call(*arguments)
    return as_sync_error(RuntimeError(f"Worker failed with error '{caught.value}', please check the stack trace"))


def meet(engine: Any, **info: Any) -> None:
    engine.init_transfer_engine(engine.parse_init_info(info))


def test_an_update_left_open_has_a_code_until_it_is_ended(engine):
    meet(engine)
    engine.start_weight_update()
    assert raised(lambda: meet(engine)).reason == UPDATE_OPEN
    engine.update_weights({"abort": True})
    engine.finish_weight_update()
    meet(engine)
    engine.start_weight_update()
    error = raised(engine.update_weights, {"abort": True})
    assert (error.phase, error.reason) == ("load", None)


def test_handles_that_the_worker_does_not_know_have_a_code(engine):
    engine.start_weight_update()
    error = raised(engine.update_weights, {"table": "unheard of", "last": True})
    assert (error.phase, error.receiver, error.reason) == ("transfer", "server", UNKNOWN_HANDLES)


def test_other_errors_name_their_phase_and_have_no_code(engine, tmp_path, monkeypatch):
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    error = raised(lambda: meet(engine, paths=["/etc/passwd"]))
    assert (error.phase, error.reason) == ("load", None)
    engine.start_weight_update()
    assert "last bucket has not come" in raised(engine.finish_weight_update).problem
    engine.finish_weight_update()
    engine.start_weight_update()
    assert "no process group" in raised(engine.update_weights, {"bytes": 10, "last": True}).problem
