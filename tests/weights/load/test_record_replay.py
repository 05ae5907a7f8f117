"""One pass through a record: what is copied at once, what waits, and what is compared."""

from __future__ import annotations

import torch
from helpers.loader_models import LoaderModel, fill_with_nan, metadata_of_stream, random_weights
from torch import nn

from vgen.weights.load.load_record import make_record
from vgen.weights.load.record_replay import RecordReplay
from vgen.weights.source.address_snapshot import AddressSnapshot


def record_of(model):
    return make_record(model, metadata_of_stream(random_weights()))


def replay_of(model, **options) -> RecordReplay:
    record = record_of(model)
    fill_with_nan(model)
    return RecordReplay(record, **options)


def test_tensors_are_copied_as_they_come_unless_they_stay_where_they_are():
    model = LoaderModel()
    stream = dict(random_weights())
    replay = replay_of(model)
    assert replay.add("q", stream["q"])
    assert torch.equal(model.qk[:4], stream["q"])
    assert replay.waiting == []
    assert not replay.all_in_place
    assert replay.missing() == ["k", "embed", "head"]

    trainer = nn.ParameterDict(stream)
    replay = replay_of(model, addresses=AddressSnapshot.of(trainer))
    for name, tensor in trainer.items():
        assert replay.add(name, tensor.detach())
    assert model.qk.isnan().all()
    assert len(replay.waiting) == 4
    assert replay.all_in_place
    replay.add("k", stream["k"].clone())  # a copy is no part of the trainer's model
    assert not replay.all_in_place


def test_parts_wait_until_they_are_copied_together():
    model = LoaderModel()
    stream = random_weights()
    replay = replay_of(model, parts=True, verify=True)
    assert all(replay.add(name, tensor) for name, tensor in stream[:2])
    assert model.qk.isnan().all()
    replay.copy()
    assert torch.equal(model.qk, torch.cat([tensor for _, tensor in stream[:2]]))
    assert replay.waiting == []
    assert replay.differences.names() == ()


def test_what_differs_from_its_source_is_named():
    model = LoaderModel()
    trainer = nn.ParameterDict(dict(random_weights()))
    replay = replay_of(model, addresses=AddressSnapshot.of(trainer), verify=True)
    for name in ("q", "k", "embed", "head"):
        replay.add(name, trainer[name].detach())
    for place, value in replay.waiting[1:]:
        place.data.copy_(value)
    replay.compare()
    assert replay.differences.names() == ("qk",)


def test_of_two_names_of_one_destination_the_last_is_copied():
    model = LoaderModel(tied=True)
    stream = dict(random_weights(tied=True))
    for order in (["embed", "head"], ["head", "embed"]):
        replay = replay_of(model)
        assert all(replay.add(name, stream[name]) for name in order)
        assert torch.equal(model.embed[:10], stream["head"])


def test_another_layout_than_recorded_is_refused():
    replay = replay_of(LoaderModel())
    assert not replay.add("q", torch.zeros(3, 8))
    assert not replay.add("q", torch.zeros(4, 8).half())
    assert not replay.add("unheard of", torch.zeros(1))
