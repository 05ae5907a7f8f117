"""Loads by a record: whole sources and parts, what is refused, and copies that are repeated without a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.loader_models import LoaderModel, fill_with_nan, loaded, metadata_of_stream, random_weights, runner_of
from torch import nn

from vgen import WeightSyncError
from vgen.engine_protocol import Source
from vgen.weights.load import record_replay, recorded_copy, reload_check
from vgen.weights.load.batched_copy import copy_pairs
from vgen.weights.load.load_record import UnsafeRecord
from vgen.weights.load.recorded_copy import RecordedCopy
from vgen.weights.load.unloaded_tensors import UnloadedTensors
from vgen.weights.source.module_source import source_of


def test_a_tied_weight_comes_under_two_names(monkeypatch):
    model = LoaderModel(tied=True)
    copier, runner = loaded(model, monkeypatch)
    stream = dict(random_weights(tied=True))
    copier.load(runner, source_of(stream), verify=True)
    assert torch.equal(model.embed[:10], stream["head"])


@pytest.mark.parametrize("equal", [True, False])
def test_two_tensors_for_one_place_are_refused_also_while_they_are_equal(monkeypatch, equal):
    model = LoaderModel(tied=True)
    copier, runner = loaded(model, monkeypatch)
    before = model.embed.clone()
    stream = dict(random_weights())
    stream["head"] = stream["embed"].clone() if equal else stream["head"]
    for _ in range(2):
        with pytest.raises(WeightSyncError, match=r"keeps one tensor for it and 'head'.*not tied") as caught:
            copier.load(runner, source_of(stream))
        assert (caught.value.phase, caught.value.parameter) == ("load", "embed")
        assert torch.equal(model.embed, before)  # refused before anything changed
    copier.load(runner, source_of(random_weights(tied=True)))


@pytest.mark.parametrize(
    ("change", "problem", "parameter"),
    [
        ({"k": torch.randn(2, 9)}, "the engine's loader refuses it", "k"),
        ({"new": torch.randn(1)}, "the engine's loader refuses it", "new"),
        ({"q": None}, "does not provide it", "qk"),
    ],
)
@pytest.mark.fault(
    point="a recorded copy of weights",
    did="A tensor has another shape",
    happens="`WeightSyncError` before anything changes",
    within=60,
)
def test_a_tensor_that_does_not_fit_is_refused_before_anything_changed(monkeypatch, change, problem, parameter):
    model = LoaderModel()
    copier, runner = loaded(model, monkeypatch)
    before = model.qk.clone()
    stream = {name: t for name, t in (dict(random_weights()) | change).items() if t is not None}
    with pytest.raises(WeightSyncError, match=problem) as caught:
        copier.load(runner, source_of(stream))
    assert caught.value.parameter == parameter
    assert torch.equal(model.qk, before)
    copier.load(runner, source_of(random_weights()))


def test_a_source_that_cannot_describe_itself_is_held_to_what_it_yielded_first(monkeypatch):
    class Undescribed(Source):
        def __init__(self, stream):
            self.stream = stream

        def __iter__(self):
            return iter(self.stream)

    copier, runner = loaded(LoaderModel(), monkeypatch)
    for change in ({"k": torch.randn(2, 9)}, {"k": torch.randn(2, 8).half()}, {"new": torch.randn(1)}):
        copier.load(runner, Undescribed(random_weights()))
        with pytest.raises(WeightSyncError, match=r"came, where .* was said to come"):
            copier.load(runner, Undescribed(list((dict(random_weights()) | change).items())))
    copier.load(runner, Undescribed(random_weights()))
    with pytest.raises(WeightSyncError, match="does not provide it") as caught:
        copier.load(runner, Undescribed(random_weights()[1:]))
    assert caught.value.parameter == "q"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(monkeypatch, value):
    copier, runner = loaded(LoaderModel(), monkeypatch)
    stream = dict(random_weights())
    stream["k"][1, 3] = value
    with pytest.raises(WeightSyncError, match="not finite") as caught:
        copier.load(runner, source_of(stream), verify=True)
    assert (caught.value.phase, caught.value.parameter) == ("verify", "k")


def test_a_source_that_is_laid_out_otherwise_is_read_right(monkeypatch):
    model = LoaderModel()
    stream = dict(random_weights())
    stream["k"] = torch.randn(8, 2).t()
    stream["q"] = torch.randn(10, 8)[3:7]
    copier, runner = loaded(model, monkeypatch)
    copier.load(runner, source_of(stream), verify=True)
    assert torch.equal(model.qk, torch.cat([stream["q"], stream["k"]]))


def test_a_stream_may_reuse_its_memory_for_the_next_tensor(monkeypatch):
    model, stream = LoaderModel(), random_weights()

    class Poisoned(Source):
        def __iter__(self):
            for name, tensor in stream:
                lent = tensor.clone()
                yield name, lent
                lent.fill_(float("nan"))

    copier, runner = loaded(model, monkeypatch)
    copier.load(runner, Poisoned(), verify=True)
    assert torch.equal(model.qk, torch.cat([dict(stream)["q"], dict(stream)["k"]]))


def in_parts(copier: RecordedCopy, runner: Any, stream, size: int, *, told=None, verify: bool = True) -> None:
    """As from buckets: the parts come one after the other in the same memory."""
    memory = torch.empty(size * 80)
    assert copier.begin(
        runner, metadata_of_stream(stream) if told is None else told, source_of(stream).ties(), verify=verify
    )
    parts = [stream[start : start + size] for start in range(0, len(stream), size)]
    for number, part in enumerate(parts):
        lent = [
            (name, memory[80 * index :][: tensor.numel()].view(tensor.shape))
            for index, (name, tensor) in enumerate(part)
        ]
        for (_, place), (_, tensor) in zip(lent, part, strict=True):
            place.copy_(tensor)
        copier.take(lent, last=number == len(parts) - 1)
        memory.fill_(float("nan"))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_in_the_same_memory_leave_what_the_loader_leaves(monkeypatch, size, tied):
    model, by_hand = LoaderModel(tied), LoaderModel(tied)
    copier, runner = loaded(model, monkeypatch)
    for _ in range(2):
        stream = random_weights(tied=tied)
        by_hand.load_weights(stream)
        fill_with_nan(model)
        in_parts(copier, runner, stream, size)
        assert not copier.under_way
        assert copier.way == "foreach"
        for mine, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_parts_that_differ_or_do_not_come_are_named(monkeypatch):
    stream = random_weights()
    with pytest.raises(WeightSyncError, match="not tied") as caught:
        in_parts(*loaded(LoaderModel(tied=True), monkeypatch), stream, 2)
    assert (caught.value.phase, caught.value.parameter) == ("load", "embed")
    copier, runner = loaded(LoaderModel(), monkeypatch)
    with pytest.raises(WeightSyncError, match="does not provide it") as caught:
        in_parts(copier, runner, stream[1:], 2, told=metadata_of_stream(stream))
    assert caught.value.parameter == "q"
    copier.give_up()
    assert not copier.under_way
    with pytest.raises(WeightSyncError, match=r"a size of \[3, 8\] in torch.float32 came, where \[4, 8\]") as caught:
        in_parts(copier, runner, [("q", torch.randn(3, 8)), *stream[1:]], 2, told=metadata_of_stream(stream))
    assert caught.value.parameter == "q"
    copier, runner = loaded(LoaderModel(), monkeypatch)
    monkeypatch.setattr(record_replay, "copy_pairs", lambda pairs: copy_pairs(pairs[:-1]))
    with pytest.raises(WeightSyncError, match="differs from its source") as caught:
        in_parts(copier, runner, stream, 4)
    assert caught.value.parameter == "head"


def test_parts_that_are_not_announced_are_for_the_engines_reload(monkeypatch):
    copier, runner = loaded(LoaderModel(), monkeypatch)
    assert not copier.begin(runner, None, {})
    assert (copier.recorded, copier.under_way, copier.way) == (False, False, "reload")
    assert copier.reason == "the trainer does not say beforehand what it sends"
    in_parts(copier, runner, random_weights(), 4)
    assert copier.recorded


def trainer_model() -> nn.Module:
    return nn.ParameterDict(dict(random_weights()))


@pytest.mark.fault(
    point="a recorded copy of weights",
    did="An element differs after the copy",
    happens="`verify` names it",
    within=60,
)
def test_what_differs_after_a_copy_is_named(monkeypatch):
    copier, runner = loaded(LoaderModel(), monkeypatch)
    monkeypatch.setattr(recorded_copy, "copy_pairs", lambda pairs: copy_pairs(pairs[:-1]))
    with pytest.raises(WeightSyncError, match="differs from its source") as caught:
        copier.load(runner, source_of(trainer_model()), verify=True)
    assert caught.value.parameter == "qk"


class FakeBatchedCopy:
    """As `BatchedCopy`, which needs CUDA, by torch's own copies. Notes what it does in `calls`."""

    how = "kernel"
    calls: list[str]

    def __init__(self, pairs):
        self.pairs = pairs
        self.largest = {tensor.untyped_storage().data_ptr() for tensor in pairs[0]}
        self.run()

    def start(self):
        self.calls.append("start")
        self.pairs[0][0].copy_(self.pairs[0][1])

    def finish(self):
        self.calls.append("finish")
        for place, value in self.pairs[1:]:
            place.copy_(value)

    def run(self):
        self.start()
        self.finish()


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(FakeBatchedCopy, "calls", [], raising=False)
    monkeypatch.setattr(recorded_copy, "batched_copy_of", FakeBatchedCopy)
    return FakeBatchedCopy.calls


def test_copies_are_repeated_without_a_pass_while_both_sides_keep_their_addresses(monkeypatch, calls):
    model, trainer = LoaderModel(), trainer_model()
    copier, runner = loaded(model, monkeypatch)
    source = source_of(trainer)

    def sync() -> tuple[str, bool]:
        calls.clear()
        passes = source.passes
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.normal_()
        fill_with_nan(model)
        copier.load(runner, source)
        assert torch.equal(model.qk, torch.cat([trainer["q"], trainer["k"]]))
        assert torch.equal(model.head[:10], trainer["head"])
        assert not model.head[10:].any()
        return copier.way, source.passes > passes

    assert sync() == ("foreach", True)
    assert sync() == ("kernel", True)  # the same addresses for the second time
    assert sync() == ("kernel", False)
    assert calls == ["start", "finish"]
    assert source.seconds == 0
    trainer["head"].data = trainer["head"].data.clone()
    assert [sync(), sync(), sync()] == [("foreach", True), ("kernel", True), ("kernel", False)]
    trainer["more"] = nn.Parameter(torch.ones(1))  # seen after the copy: the pass that follows meets it
    with pytest.raises(WeightSyncError, match="the engine's loader refuses it"):
        copier.load(runner, source)
    del trainer["more"]
    assert sync() == ("foreach", True)


def test_after_a_sleep_what_no_loader_writes_is_written_back_first(monkeypatch, calls):
    model, slopes = LoaderModel(), torch.tensor([0.5, 0.25])
    copier, runner = loaded(model, monkeypatch, outside=UnloadedTensors([slopes]))
    source = source_of(trainer_model())
    for _ in range(3):
        copier.load(runner, source)
    calls.clear()
    copier.forget()
    slopes.zero_(), model.angles.zero_()
    copier.load(runner, source)
    assert slopes.tolist() == [0.5, 0.25]
    assert model.angles.tolist() == [0, 1, 2]
    assert calls == ["start", "finish"]
    slopes.fill_(9.0)
    copier.load(runner, source)
    assert slopes.tolist() == [9.0, 9.0]  # once, and not after every later sync


@pytest.mark.fault(
    point="a recorded copy of weights",
    did="A record is not safe",
    happens="The engine reloads, with the reason",
    within=60,
)
def test_a_record_that_is_not_safe_is_reloaded_or_refused_and_the_reason_is_kept(monkeypatch):
    streams = list[str]()
    sources = [source_of(random_weights()) for _ in range(2)]

    def reload(runner, stream):
        streams.append("source" if stream._weights in sources else "random")
        runner.get_model().load_weights(stream)

    def unsafe(*_):
        raise UnsafeRecord({"layers.1": "the engine has repacked it"})

    monkeypatch.setattr(recorded_copy, "reload", reload)
    monkeypatch.setattr(reload_check, "reload", reload)
    monkeypatch.setattr(recorded_copy, "layout_change", lambda module: None)
    monkeypatch.setattr(recorded_copy, "verify_record", unsafe)
    model = LoaderModel()
    copier = RecordedCopy()
    for source in sources:
        copier.load(runner_of(model), source)
        assert (copier.recorded, copier.way) == (False, "reload")
        assert copier.reason == "layers.1: the engine has repacked it"
    assert streams == ["random", "random", "source", "source"]  # random ones only before the first
    only = RecordedCopy(transport="recorded")
    with pytest.raises(WeightSyncError, match=r"not safe here: layers.1: .*repacked"):
        only.load(runner_of(model), source_of(random_weights()))
    with monkeypatch.context() as safe:
        safe.setattr(recorded_copy, "verify_record", lambda *_: None)
        only.load(runner_of(model), source_of(random_weights()))  # it has found out again
        assert only.recorded
    asked = RecordedCopy(transport="reload")
    asked.load(runner_of(model), source_of(random_weights()))
    assert (asked.way, asked.reason, asked.modules) == ("reload", "asked for", 1)
    too_much = RecordedCopy(outside=None)
    too_much.load(runner_of(model), source_of(random_weights()))
    assert too_much.reason == "it has too much that no loader writes"


def test_whether_a_copy_is_safe_is_undecided_until_the_first_load(monkeypatch):
    assert RecordedCopy().undecided is True
    copier, _ = loaded(LoaderModel(), monkeypatch)
    assert copier.undecided is False
    copier.discard_record()
    assert copier.undecided is True
