"""vgen's engine in a worker: which errors have which code. tests/real has what it loads, with a real engine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vgen import WeightSyncError
from vgen.weights.transports.shared_memory import DIRECTORY_VARIABLE
from vgen.weights.transports.sync_errors import UNKNOWN_HANDLES, UPDATE_OPEN, as_sync_error

pytestmark = pytest.mark.real
pytest.importorskip("vllm")


def receiver(rank: int = 0, world_size: int = 1, executor: str = "uni") -> Any:
    from vgen.engines.server.weight_receiver import VgenEngine

    parallel = SimpleNamespace(
        world_size=world_size, distributed_executor_backend=executor, data_parallel_index=0, rank=rank
    )
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    return VgenEngine(SimpleNamespace(), config, torch.device("cpu"), torch.nn.Linear(1, 1))  # pyright: ignore


@pytest.fixture
def engine() -> Any:
    return receiver()


class Ranks:
    """Two tensor-parallel workers of one server, each in a thread of its own."""

    def __init__(self, monkeypatch: Any, executor: str = "mp") -> None:
        from vllm.distributed import parallel_state

        self.engines = [receiver(rank, 2, executor) for rank in range(2)]
        self._pool, self._meeting = ThreadPoolExecutor(2), threading.Barrier(2)
        self._rank, self._said = threading.local(), [None, None]
        alone = SimpleNamespace(world_size=1)
        monkeypatch.setattr(parallel_state, "get_tp_group", lambda: self)
        monkeypatch.setattr(parallel_state, "get_pp_group", lambda: alone)
        monkeypatch.setattr(torch.distributed, "all_gather_object", self._gather)

    world_size, cpu_group = 2, None

    @property
    def is_last_rank(self) -> bool:
        return self._rank.number == 1

    def _gather(self, texts: list[Any], text: Any, group: Any) -> None:
        self._said[self._rank.number] = text
        self._meeting.wait(10)
        texts[:] = self._said
        self._meeting.wait(10)

    def each(self, call: Any) -> list[Any]:
        """The `WeightSyncError` that `call(engine, rank)` raised on each rank, or None; other errors are raised."""
        from vgen.engines.server.weight_receiver import WorkerSyncError

        def run(rank: int) -> Any:
            self._rank.number = rank
            try:
                call(self.engines[rank], rank)
            except WorkerSyncError as error:
                return as_sync_error(error)

        return list(self._pool.map(run, range(2)))

    def fail(self, *failing: int) -> list[Any]:
        """What an update raises in whose first bucket these ranks fail."""
        self.each(lambda engine, rank: engine.start_weight_update())

        def load(rank: int) -> Any:
            def received(info: Any) -> None:
                if rank in failing:
                    raise WeightSyncError(f"of rank {rank}", phase="load")

            return received

        for rank, engine in enumerate(self.engines):
            engine.receive_weights = load(rank)
        return self.each(lambda engine, rank: engine.update_weights({}))


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


@pytest.mark.parametrize(("failing", "problem"), [((0,), "of rank 0"), ((1,), "of rank 1"), ((0, 1), "of rank 0")])
@pytest.mark.fault(
    point="the workers of one engine in several processes",
    did="Loading fails on one tensor-parallel worker",
    happens="All workers fail, with the first rank's error",
    within=20,
)
def test_what_fails_on_some_rank_fails_on_all_and_the_last_raises_the_first_ranks_error(monkeypatch, failing, problem):
    ranks = Ranks(monkeypatch)
    first, last = ranks.fail(*failing)
    assert first is None
    assert (last.problem, last.phase) == (problem, "load")
    # The trainer may have sent the next bucket already: it is for nobody.
    for engine in ranks.engines:
        engine.receive_weights = lambda info: pytest.fail("a bucket of an update that has failed was loaded")
    assert ranks.each(lambda engine, rank: engine.update_weights({})) == [None, None]
    assert ranks.each(lambda engine, rank: engine.finish_weight_update()) == [None, None]
    assert ranks.fail() == [None, None]


def test_workers_in_the_trainers_own_processes_raise_each(monkeypatch):
    first, last = Ranks(monkeypatch, "external_launcher").fail(1)
    assert first.problem == last.problem == "of rank 1"
