"""Records of loaders: a replay leaves what the loader leaves, and loaders that a record cannot describe are refused."""

from __future__ import annotations

import pytest
import torch
from helpers.loader_models import LoaderModel, fill_with_nan, metadata_of_stream, random_weights, replay
from torch import nn

from vgen.weights.load import load_record, unloaded_tensors
from vgen.weights.load.load_record import UnsafeRecord, make_record, verify_record
from vgen.weights.load.unloaded_tensors import UnloadedTensors


class Flips(LoaderModel):
    def load(self, name, tensor):
        if name == "q":
            self.qk.data[:4].copy_(tensor.flip(0))
        else:
            super().load(name, tensor)


class Transposed(LoaderModel):
    def load(self, name, tensor):
        if name == "embed":
            self.embed.data[:10].copy_(tensor.t().view(2, 4, 10).permute(2, 0, 1).flatten(1).narrow(1, 0, 8)[:10])
            self.embed.data[10:].zero_()
        elif name == "q":
            for row, part in zip(self.qk.data[:4].unbind(0), tensor.contiguous().chunk(4), strict=True):
                row.copy_(part.squeeze(0).to(self.qk.device))
        else:
            super().load(name, tensor)


@pytest.mark.parametrize("kind", [LoaderModel, Transposed])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_replaying_leaves_what_the_loader_leaves(kind, dtypes):
    source, own = dtypes
    model, by_hand = kind(dtype=own), kind(dtype=own)
    made = make_record(model, metadata_of_stream(random_weights(source)))
    assert all((parameter == 0).all() for parameter in model.parameters()), "recording must write nothing"
    for _ in range(2):
        stream = random_weights(source)
        fill_with_nan(model), fill_with_nan(by_hand)
        by_hand.load_weights(stream)
        replay(made, stream)
        for mine, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(mine, other)


class Permutes(LoaderModel):
    def load(self, name, tensor):
        if name == "q":
            temporary = torch.empty_like(self.qk[:4])
            temporary.copy_(tensor[[2, 3, 0, 1]])
            tensor = temporary
        super().load(name, tensor)


class PermutesIntoItsTemporary(LoaderModel):
    def load(self, name, tensor):
        if name == "q":
            temporary = torch.empty(4, 8)
            temporary[:2].copy_(tensor[2:])
            temporary[2:].copy_(tensor[:2])
            tensor = temporary
        super().load(name, tensor)


class SwapsHalves(LoaderModel):
    def load_weights(self, weights):
        super().load_weights(weights)
        half = self.qk.data[:3].clone()
        self.qk.data[:3].copy_(self.qk.data[3:])
        self.qk.data[3:].copy_(half)


class Composes(LoaderModel):
    def load_weights(self, weights):
        super().load_weights(weights)
        self.qk.data.copy_(-torch.exp(self.qk.data))


class AddsOne(LoaderModel):
    def load(self, name, tensor):
        super().load(name, tensor + 1 if name == "embed" else tensor)


class AddsInPlace(LoaderModel):
    def load_weights(self, weights):
        super().load_weights(weights)
        self.qk.data += 1


class ChangesTheSource(LoaderModel):
    def load(self, name, tensor):
        super().load(name, tensor.contiguous().mul_(2) if name == "k" else tensor)


class ReadsValues(LoaderModel):
    def load(self, name, tensor):
        if name == "k":
            tensor = tensor * float(tensor.max())
        super().load(name, tensor)


class Replaces(LoaderModel):
    def load(self, name, tensor):
        if name == "head":
            self.head.data = tensor
        else:
            super().load(name, tensor)


class RegistersAnew(LoaderModel):
    def load(self, name, tensor):
        if name == "head":
            self.head = nn.Parameter(torch.zeros(12, 8))
        super().load(name, tensor)


class KeepsAside(LoaderModel):
    def load(self, name, tensor):
        super().load(name, tensor)
        if name == "head":
            self.scaled = tensor


class LeavesPadding(LoaderModel):
    def load(self, name, tensor):
        if name == "embed":
            self.embed.data[:10].copy_(tensor)
        else:
            super().load(name, tensor)


class FillsAfterwards(LoaderModel):
    def load(self, name, tensor):
        super().load(name, tensor)
        if name == "k":
            self.qk.data[5].zero_()


class Overlaps(LoaderModel):
    def load(self, name, tensor):
        if name == "k":
            self.qk.data[3:5].copy_(tensor)
            self.qk.data[5:].copy_(tensor[:1])
        else:
            super().load(name, tensor)


class Broadcasts(LoaderModel):
    def load(self, name, tensor):
        if name == "k":
            self.qk.data[4:].copy_(tensor[0])
        else:
            super().load(name, tensor)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Permutes, "q"),
        (PermutesIntoItsTemporary, "q"),
        (SwapsHalves, "qk"),
        (Composes, "qk"),
        (AddsOne, "embed"),
        (AddsInPlace, "qk"),
        (ChangesTheSource, "k"),
        (ReadsValues, "cannot be recorded"),
        (Replaces, "cannot be recorded"),
        (RegistersAnew, "replaces tensors"),
        (KeepsAside, "outside parameters"),
        (LeavesPadding, "embed"),
        (FillsAfterwards, "constant is written over"),
        (Overlaps, "written twice"),
        (Broadcasts, "broadcast"),
        (Flips, "flip"),
    ],
)
@pytest.mark.fault(
    point="a recorded copy of weights",
    did="A loader does what a record cannot repeat",
    happens="Its module is left to the engine's reload",
    within=60,
)
def test_loaders_that_would_fool_a_record_are_found_out(kind, words):
    model = kind()
    tensors = {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.named_parameters()}
    with pytest.raises(UnsafeRecord, match=words):
        make_record(model, metadata_of_stream(random_weights()))
    assert {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.named_parameters()} == tensors


def test_a_record_is_in_place_until_a_tensor_moves():
    model = LoaderModel()
    record = make_record(model, metadata_of_stream(random_weights()))
    assert record.in_place(buffers=True)
    model.angles = model.angles.clone()  # a buffer that no loader writes
    assert record.in_place()
    assert not record.in_place(buffers=True)
    model.qk.data = model.qk.data.clone()
    assert not record.in_place()


def test_what_no_loader_writes_is_kept_unless_it_is_too_much(monkeypatch):
    model, metadata = LoaderModel(), metadata_of_stream(random_weights())
    record = make_record(model, metadata)
    assert [tensor.tolist() for tensor, _ in record.unloaded] == [[0, 1, 2]]
    monkeypatch.setattr(unloaded_tensors, "MOST_BYTES", 8)
    with pytest.raises(UnsafeRecord, match="too much that no loader writes"):
        make_record(model, metadata)


def test_copies_of_a_tied_weight_are_twins():
    record = make_record(LoaderModel(tied=True), metadata_of_stream(random_weights()))
    assert [(copy.source, wins) for copy, wins in record.of("embed")] == [("embed", False)]
    assert [(copy.source, wins) for copy, wins in record.of("head")] == [("head", True)]
    (twin,), (winner,) = record.twins["embed"], record.copies["head"]
    assert record.shared == {twin.place.data_ptr()} == {winner.place.data_ptr()}


@pytest.fixture
def reloads(monkeypatch):
    """In place of vLLM's reload: loads by the model's loader, then does what a test sets as `reloads.then`."""

    class Reloads:
        def then(self, model: nn.Module) -> None: ...

        def __call__(self, model, stream):
            with torch.no_grad():
                model.load_weights(stream)
                self.then(model)

    made = Reloads()
    monkeypatch.setattr(load_record, "reload", made)
    return made


def changed(name):
    return lambda model: getattr(model, name).data.view(-1)[0].add_(1)


def verified(model, outside=()):
    metadata = metadata_of_stream(random_weights())
    verify_record(make_record(model, metadata), model, metadata, UnloadedTensors(outside))


@pytest.mark.parametrize("tied", [False, True])
def test_a_reload_that_leaves_what_the_record_says_proves_it(reloads, tied):
    verified(LoaderModel(tied))


@pytest.mark.parametrize(
    ("then", "name"), [(changed("qk"), "qk"), (changed("embed"), "embed"), (changed("angles"), "a tensor that is not")]
)
@pytest.mark.fault(
    point="a recorded copy of weights",
    did="The record's proof leaves other bytes than the reload",
    happens="The record is refused",
    within=60,
)
def test_a_reload_that_leaves_something_else_is_found_out(reloads, then, name):
    reloads.then = then
    with pytest.raises(UnsafeRecord, match="something else than the record") as caught:
        verified(LoaderModel())
    assert [path for path in caught.value.reasons if path.startswith(name)]


def test_a_reload_that_changes_a_tensor_outside_the_registries_is_found_out(reloads):
    slopes = torch.ones(2)
    reloads.then = lambda model: slopes.zero_()
    with pytest.raises(UnsafeRecord, match="a tensor that is not loaded"):
        verified(LoaderModel(), [slopes])


def test_a_reload_that_fails_or_replaces_tensors_is_found_out(reloads):
    reloads.then = lambda model: setattr(model.qk, "data", model.qk.data.clone())
    with pytest.raises(UnsafeRecord, match="replaces tensors"):
        verified(LoaderModel())

    def fails(model):
        raise RuntimeError

    reloads.then = fails
    with pytest.raises(UnsafeRecord, match="reload fails: RuntimeError"):
        verified(LoaderModel())
