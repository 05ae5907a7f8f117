"""What a record of a loader holds, and which loaders are found out. No engine: modules with a loader of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vgen.weights.mover import copy_together, moves_of
from vgen.weights.proven import Distrusted, make_record
from vgen.weights.recorded import RecordedCopy

SHAPES = {"q": (4, 8), "k": (2, 8), "embed": (10, 8), "head": (10, 8)}


class Model(nn.Module):
    """q and k become one weight, the embedding has two rows of padding, the head may share it."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.zeros(6, 8, dtype=dtype))
        self.embed = nn.Parameter(torch.zeros(12, 8, dtype=dtype))
        self.head = self.embed if tied else nn.Parameter(torch.zeros(12, 8, dtype=dtype))
        self.register_buffer("angles", torch.arange(3.0))

    def load_weights(self, weights):
        for name, tensor in weights:
            self.load(name, tensor)

    def load(self, name, tensor):
        if name in ("q", "k"):
            self.qk.data[slice(0, 4) if name == "q" else slice(4, 6)].copy_(tensor)
        else:
            parameter = getattr(self, name)
            parameter[:10].data.copy_(tensor)
            parameter[10:].data.fill_(0)


def weights(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    found = {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
    return list(found.items())


def metadata(stream):
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in stream]


def replay(made, stream) -> None:
    with torch.no_grad():
        for fill in made.fills:
            fill.place.fill_(fill.value)
        copy_together([(copy.place, copy.part.of(t)) for name, t in stream for copy in made.copies.get(name, ())])


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


class Flips(Model):
    def load(self, name, tensor):
        if name == "q":
            self.qk.data[:4].copy_(tensor.flip(0))
        else:
            super().load(name, tensor)


class Transposed(Model):
    def load(self, name, tensor):
        if name == "embed":
            self.embed.data[:10].copy_(tensor.t().view(2, 4, 10).permute(2, 0, 1).flatten(1).narrow(1, 0, 8)[:10])
            self.embed.data[10:].zero_()
        elif name == "q":
            for row, part in zip(self.qk.data[:4].unbind(0), tensor.contiguous().chunk(4), strict=True):
                row.copy_(part.squeeze(0).to(self.qk.device))
        else:
            super().load(name, tensor)


@pytest.mark.parametrize("kind", [Model, Transposed])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_replaying_leaves_what_the_loader_leaves(kind, dtypes):
    source, own = dtypes
    model, by_hand = kind(dtype=own), kind(dtype=own)
    made = make_record(model, metadata(weights(source)))
    assert all((parameter == 0).all() for parameter in model.parameters()), "recording must write nothing"
    for _ in range(2):
        stream = weights(source)
        spoil(model), spoil(by_hand)
        by_hand.load_weights(stream)
        replay(made, stream)
        for mine, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(mine, other)


class Permutes(Model):
    def load(self, name, tensor):
        if name == "q":
            temporary = torch.empty_like(self.qk[:4])
            temporary.copy_(tensor[[2, 3, 0, 1]])
            tensor = temporary
        super().load(name, tensor)


class PermutesIntoItsTemporary(Model):
    def load(self, name, tensor):
        if name == "q":
            temporary = torch.empty(4, 8)
            temporary[:2].copy_(tensor[2:])
            temporary[2:].copy_(tensor[:2])
            tensor = temporary
        super().load(name, tensor)


class SwapsHalves(Model):
    def load_weights(self, weights):
        super().load_weights(weights)
        half = self.qk.data[:3].clone()
        self.qk.data[:3].copy_(self.qk.data[3:])
        self.qk.data[3:].copy_(half)


class Composes(Model):
    def load_weights(self, weights):
        super().load_weights(weights)
        self.qk.data.copy_(-torch.exp(self.qk.data))


class AddsOne(Model):
    def load(self, name, tensor):
        super().load(name, tensor + 1 if name == "embed" else tensor)


class AddsInPlace(Model):
    def load_weights(self, weights):
        super().load_weights(weights)
        self.qk.data += 1


class ChangesTheSource(Model):
    def load(self, name, tensor):
        super().load(name, tensor.contiguous().mul_(2) if name == "k" else tensor)


class ReadsValues(Model):
    def load(self, name, tensor):
        if name == "k":
            tensor = tensor * float(tensor.max())
        super().load(name, tensor)


class Replaces(Model):
    def load(self, name, tensor):
        if name == "head":
            self.head.data = tensor
        else:
            super().load(name, tensor)


class RegistersAnew(Model):
    def load(self, name, tensor):
        if name == "head":
            self.head = nn.Parameter(torch.zeros(12, 8))
        super().load(name, tensor)


class KeepsAside(Model):
    def load(self, name, tensor):
        super().load(name, tensor)
        if name == "head":
            self.scaled = tensor


class LeavesPadding(Model):
    def load(self, name, tensor):
        if name == "embed":
            self.embed.data[:10].copy_(tensor)
        else:
            super().load(name, tensor)


class FillsAfterwards(Model):
    def load(self, name, tensor):
        super().load(name, tensor)
        if name == "k":
            self.qk.data[5].zero_()


class Overlaps(Model):
    def load(self, name, tensor):
        if name == "k":
            self.qk.data[3:5].copy_(tensor)
            self.qk.data[5:].copy_(tensor[:1])
        else:
            super().load(name, tensor)


class Broadcasts(Model):
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
def test_loaders_that_would_fool_a_record_are_found_out(kind, words):
    model = kind()
    tensors = {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.named_parameters()}
    with pytest.raises(Distrusted, match=words):
        make_record(model, metadata(weights()))
    assert {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.named_parameters()} == tensors


class Source:
    def __init__(self, stream, model=None):
        self.stream, self.model = stream, model
        self.bytes = self.tensors = 0
        self.seconds = 0.0

    def __iter__(self):
        return iter(self.stream)


class Runner:
    def reset_lora_state(self):
        pass


def brought(model, stream=None) -> RecordedCopy:
    copier = RecordedCopy()
    copier._record, copier._decided = make_record(model, metadata(stream or weights())), True
    return copier


def test_a_tied_weight_may_come_under_two_names():
    model = Model(tied=True)
    copier = brought(model)
    for same in (True, False):  # one tensor, and two that are equal
        stream = dict(weights())
        stream["head"] = stream["embed"] if same else stream["embed"].clone()
        copier.load(Runner(), Source(stream.items()), verify=True)
        assert torch.equal(model.embed[:10], stream["head"])


def test_two_different_tensors_for_one_place_are_refused():
    from vgen import WeightSyncError

    copier = brought(Model(tied=True))
    with pytest.raises(WeightSyncError, match="two sources") as caught:
        copier.load(Runner(), Source(weights()))
    assert caught.value.phase == "verify"
    assert caught.value.parameter == "embed"


def test_a_tensor_of_another_shape_or_dtype_or_none_at_all_is_refused():
    from vgen import WeightSyncError

    for change in ({"k": torch.randn(2, 9)}, {"k": torch.randn(2, 8).half()}, {"new": torch.randn(1)}):
        with pytest.raises(WeightSyncError, match="as it was recorded"):
            brought(Model()).load(Runner(), Source((dict(weights()) | change).items()))
    with pytest.raises(WeightSyncError, match="does not provide it") as caught:
        brought(Model()).load(Runner(), Source(weights()[1:]))
    assert caught.value.parameter == "q"


def test_a_source_that_is_laid_out_otherwise_is_read_right():
    model = Model()
    stream = dict(weights())
    stream["k"] = torch.randn(8, 2).t()
    stream["q"] = torch.randn(10, 8)[3:7]
    brought(model).load(Runner(), Source(stream.items()), verify=True)
    assert torch.equal(model.qk, torch.cat([stream["q"], stream["k"]]))


def test_a_stream_may_reuse_its_memory_for_the_next_tensor():
    model, stream = Model(), weights()

    class Poisoned(Source):
        def __iter__(self):
            for name, tensor in self.stream:
                lent = tensor.clone()
                yield name, lent
                lent.fill_(float("nan"))

    brought(model).load(Runner(), Poisoned(stream, model=nn.Linear(2, 2)), verify=True)
    assert torch.equal(model.qk, torch.cat([dict(stream)["q"], dict(stream)["k"]]))


def in_parts(copier: RecordedCopy, stream, size: int, *, told=None, verify: bool = True) -> None:
    """As from buckets: the parts come one after the other in the same memory."""
    memory = torch.empty(size * 80)
    assert copier.begin(Runner(), metadata(stream) if told is None else told, verify=verify)
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
def test_parts_in_the_same_memory_leave_what_the_loader_leaves(size, tied):
    model, by_hand = Model(tied), Model(tied)
    copier = brought(model)
    for _ in range(2):
        stream = dict(weights())
        stream["head"] = stream["embed"].clone() if tied else stream["head"]
        by_hand.load_weights(stream.items())
        spoil(model)
        in_parts(copier, list(stream.items()), size)
        assert not copier.under_way
        assert copier.way == "foreach"
        for mine, other in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_parts_that_differ_or_do_not_come_are_named(monkeypatch):
    from vgen import WeightSyncError
    from vgen.weights import recorded

    stream = weights()
    with pytest.raises(WeightSyncError, match="two sources") as caught:
        in_parts(brought(Model(tied=True)), stream, 2)
    assert (caught.value.phase, caught.value.parameter) == ("verify", "embed")
    copier = brought(Model())
    with pytest.raises(WeightSyncError, match="does not provide it") as caught:
        in_parts(copier, stream[1:], 2, told=metadata(stream))
    assert caught.value.parameter == "q"
    copier.give_up()
    assert not copier.under_way
    with pytest.raises(WeightSyncError, match=r"a size of \[3, 8\] in torch.float32 came, where \[4, 8\]") as caught:
        in_parts(copier, [("q", torch.randn(3, 8)), *stream[1:]], 2, told=metadata(stream))
    assert caught.value.parameter == "q"
    monkeypatch.setattr(recorded, "copy_together", lambda pairs: copy_together(pairs[:-1]))
    with pytest.raises(WeightSyncError, match="differs from its source") as caught:
        in_parts(brought(Model()), stream, 4)
    assert caught.value.parameter == "head"


def test_what_differs_after_a_copy_is_named(monkeypatch):
    from vgen import WeightSyncError
    from vgen.weights import recorded

    trainer = nn.ParameterDict(dict(weights()))
    monkeypatch.setattr(recorded, "copy_together", lambda pairs: copy_together(pairs[:-1]))
    with pytest.raises(WeightSyncError, match="differs from its source") as caught:
        brought(Model()).load(Runner(), Source(list(trainer.items()), trainer), verify=True)
    assert caught.value.parameter == "qk"


def test_adjacent_copies_are_joined_and_rows_are_cut():
    experts, engine = torch.randn(4, 6, 256), torch.zeros(4, 6, 256)
    pairs = [(engine[e, half : half + 3], experts[e, half : half + 3]) for e in range(4) for half in (0, 3)]
    moves, others = moves_of(pairs[::-1])
    assert moves == [(engine.data_ptr(), experts.data_ptr(), experts.numel() * 4)]
    assert others == []
    columns = torch.zeros(6, 128)
    moves, others = moves_of([(columns, experts[0, :, 128:])])  # half of each row, as tensor parallelism takes it
    assert [(to - columns.data_ptr(), of - experts.data_ptr(), size) for to, of, size in moves] == [
        (row * 512, row * 1024 + 512, 512) for row in range(6)
    ]
    mixed = (torch.zeros(3, dtype=torch.bfloat16), torch.ones(3))
    assert moves_of([mixed]) == ([], [mixed])
