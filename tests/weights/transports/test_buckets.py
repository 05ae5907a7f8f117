"""The trainer's half of a transport in buckets, with a worker that looks into the memory itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from helpers.bucket_worker import Weights, Worker, numbers, same
from helpers.transfers import FakeGroup, Trace, shared_memory
from helpers.waiting import wait_until

from vgen import WeightSyncError
from vgen.profiling import semconv
from vgen.weights.transports.sync_errors import UPDATE_OPEN, to_text
from vgen.weights.transports.weight_transport import WeightUpdate


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_every_bit_of_every_dtype_and_shape_arrives(worker, tmp_path, bucket_bytes):
    weights = Weights(
        bf16=torch.randn(7, 3).bfloat16(),
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 4),
        f64=torch.randn(5, dtype=torch.float64),
        transposed=torch.randn(4, 6).t(),
        fp8=torch.randn(9).to(torch.float8_e4m3fn),
        i64=torch.arange(11),
        boolean=torch.tensor([True, False]),
        f32=torch.randn(2, 3, 4),
    )
    transport = shared_memory(worker, bucket_bytes=bucket_bytes, directory=tmp_path)
    for version in ("1", "2"):
        transport.replace_weights(weights, version)
        fp8 = worker.weights.pop("fp8")
        assert torch.equal(fp8.view(torch.uint8), weights.tensors["fp8"].view(torch.uint8))
        assert same(worker, Weights(**{k: v for k, v in weights.tensors.items() if k != "fp8"}))
        assert worker.calls[-2:] == ["last", f"finish {version}"]


def test_buckets_are_bounded_and_two_are_in_flight(worker, tmp_path):
    weights = numbers(20)
    given, at_load = list[str](), list[int]()

    class Counted(Weights):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().__iter__():
                given.append(name)
                yield name, tensor

    def before_load() -> None:
        wait_until(lambda: len(given) >= min(20, 2 * len(at_load) + 5))
        threading.Event().wait(0.02)  # in which no more must come
        at_load.append(len(given))

    worker.before_load = before_load
    transport = shared_memory(worker, bucket_bytes=8192, directory=tmp_path)
    transport.replace_weights(Counted(**weights.tensors))
    assert same(worker, weights)
    assert worker.sizes == [8000] * 10
    assert transport.buckets_sent == 10
    # Two buckets are filled before the first has been loaded, and the tensor that would begin the third is known.
    assert at_load == [min(20, 2 * number + 5) for number in range(10)]


def test_a_tensor_larger_than_a_bucket_gets_one_of_its_size(worker, tmp_path):
    weights = Weights(a=torch.randn(10), big=torch.randn(10_000), b=torch.randn(10))
    transport = shared_memory(worker, bucket_bytes=100, directory=tmp_path)
    transport.replace_weights(weights)
    transport.replace_weights(weights)
    assert same(worker, weights)
    assert worker.sizes == [40, 40_000, 40] * 2


def test_an_empty_source_is_an_empty_last_bucket(worker, tmp_path):
    shared_memory(worker, directory=tmp_path).replace_weights([])
    assert worker.calls == ["init", "start", "last", "finish None"]


@pytest.mark.parametrize("call", ["init", "start", "update", "last", "finish 7"])
@pytest.mark.fault(
    point="a transfer by buckets",
    did="A server fails in the middle of a transfer",
    happens="Nothing stays behind; the next sync begins anew",
    within=60,
)
def test_a_client_that_fails_leaves_nothing_behind_and_the_next_send_begins_anew(worker, tmp_path, call):
    weights = numbers(5)
    transport = shared_memory(worker, bucket_bytes=4096, directory=tmp_path)
    worker.raises[call] = ConnectionError("the line is dead")
    with pytest.raises(WeightSyncError, match="the line is dead") as caught:
        transport.replace_weights(weights, "7")
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert list(tmp_path.iterdir()) == []
    # where an update is under way, and only there, it is ended
    assert ("abort" in worker.calls) is (call in ("update", "last"))
    transport.replace_weights(weights, "8")
    assert same(worker, weights)


@pytest.mark.fault(
    point="a transfer by buckets",
    did="A worker raises",
    happens="`WeightSyncError` with parameter and phase",
    within=60,
)
def test_the_workers_words_become_a_typed_error(worker, tmp_path):
    said = WeightSyncError("AssertionError: it", phase="load", parameter="a.b", receiver="server")
    answer = f"500: Worker failed with error '{to_text(said)}', please check the stack trace above for the root cause"
    worker.raises["last"] = RuntimeError(answer)
    with pytest.raises(WeightSyncError) as caught:
        shared_memory(worker, directory=tmp_path).replace_weights(numbers(1))
    assert (caught.value.phase, caught.value.parameter, caught.value.receiver) == ("load", "a.b", "server")
    assert str(caught.value).endswith("'a.b': AssertionError: it")


@pytest.mark.parametrize("error", [WeightSyncError("x", phase="gather"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.fault(
    point="a transfer by buckets",
    did="The source raises in the middle of a transfer",
    happens="The update is ended, and the error is raised unchanged",
    within=60,
)
def test_what_a_source_raises_goes_through_unchanged_after_the_update_is_ended(worker, tmp_path, error):
    class Breaks(Weights):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield "a", torch.ones(3)
            raise error

    threads = threading.active_count()
    with pytest.raises(type(error)) as caught:
        shared_memory(worker, directory=tmp_path).replace_weights(Breaks())
    assert caught.value is error
    assert worker.calls == ["init", "start", "abort", "finish None"]
    assert threading.active_count() == threads


@pytest.mark.fault(
    point="a transfer by buckets",
    did="A dead trainer has left an update open",
    happens="It is ended first",
    within=60,
)
def test_an_update_left_open_is_ended_first(worker, tmp_path):
    error = WeightSyncError("in any words", phase="transfer", receiver="server", reason=UPDATE_OPEN)
    worker.raises["init"] = RuntimeError(f"500: {to_text(error)}")
    shared_memory(worker, directory=tmp_path).replace_weights([])
    assert worker.calls == ["init", "abort", "finish None", "init", "start", "last", "finish None"]


@pytest.mark.fault(
    point="a transfer by buckets",
    did="A server restarts between two syncs",
    happens="It gets new buckets",
    within=60,
)
def test_a_server_that_was_started_anew_is_given_new_buckets(worker, tmp_path):
    weights = numbers(3)
    transport = shared_memory(worker, directory=tmp_path)
    transport.replace_weights(weights)
    worker.forget()
    transport.replace_weights(weights)
    assert same(worker, weights)


def test_a_sync_sends_random_weights_first_and_has_a_phase_for_each_half(worker, tmp_path):
    transport, trace, sent = shared_memory(worker, directory=tmp_path), Trace(), list[str]()

    class Source(Weights):
        seconds = 0.25

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            sent.append(self.name)
            yield from super().__iter__()

        def __init__(self, name: str) -> None:
            super().__init__(a=torch.ones(3))
            self.name = name

    group, random, source = FakeGroup(worker), Source("random"), Source("trainer's")
    transport.open(group, source)
    transport.send(WeightUpdate(source, "7", trace, random, verify=True))  # pyright: ignore[reportArgumentType]
    assert sent == ["random", "trainer's"]
    assert worker.calls == ["init", "start", "last", "finish 7", "init", "start", "last", "finish 7"]
    assert [name for name, _ in trace.phases] == ["transfer", "load"]
    attributes = trace.phases[0][1]
    assert (attributes[semconv.GATHER_SECONDS], attributes[semconv.BUCKETS]) == (0.25, 1)
    assert attributes[semconv.COPY_SECONDS] > 0
    assert group.recorded == ["update_weights", "finish_weight_update"]


def test_buckets_are_kept_while_the_servers_are_the_same(worker, tmp_path):
    transport, source = shared_memory(worker, directory=tmp_path), numbers(1)
    first, other = FakeGroup(worker), FakeGroup(worker)
    other.endpoints[0].workers = 2
    paths = list[set[str]]()
    for group in (first, first, other):
        transport.open(group, source)  # pyright: ignore[reportArgumentType]
        transport.replace_weights(source)
        paths.append(worker.paths)
    assert paths[0] == paths[1] != paths[2]
    transport.close()
