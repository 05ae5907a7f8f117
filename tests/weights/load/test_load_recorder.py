"""What the recorder notes of single operations of a loader."""

from __future__ import annotations

import pytest
import torch

from vgen.weights.load.load_recorder import TensorSlice, record_loader

METADATA = [("a", (4, 6), torch.float32), ("b", (6,), torch.float32)]


def recorded(operation, targets=None):
    """Runs `operation(place, a, b)` as a loader with one destination of zeros."""
    place = torch.zeros(4, 6)

    def load(stream):
        operation(place, *(tensor for _, tensor in stream))

    recorder = record_loader(load, [place] if targets is None else targets, METADATA)
    assert not place.any(), "recording must write nothing"
    return place, recorder


def test_a_chain_of_views_is_one_slice():
    place, recorder = recorded(lambda place, a, b: place.t()[1:3].copy_(a.view(2, 12)[:, 4:8].t()[:2].repeat(1, 2)))
    assert recorder.used["a"] == "repeat"  # which is no view
    place, recorder = recorded(lambda place, a, b: place[1:3, ::2].copy_(a.t().view(2, 3, 4)[1, :, 1:3].t()))
    (copy,) = recorder.copies
    assert not recorder.used
    assert not recorder.spoiled
    tensor = torch.randn(4, 6)
    assert torch.equal(copy.part.of(tensor), tensor.t().reshape(2, 3, 4)[1, :, 1:3].t())
    assert (copy.source, copy.target) == ("a", 0)
    copy.place.fill_(1)
    assert place.sum() == place[1:3, ::2].sum() == 6


def test_a_clone_or_a_move_to_another_device_changes_no_value():
    _, recorder = recorded(lambda place, a, b: place.copy_(a.clone().to("cpu").contiguous()))
    assert [copy.source for copy in recorder.copies] == ["a"]
    assert not recorder.used


def test_constants_are_noted_with_their_place_in_the_order():
    _, recorder = recorded(lambda place, a, b: (place[:2].zero_(), place[3].copy_(b), place[2].fill_(1.5)))
    assert [(fill.value, fill.after, fill.target) for fill in recorder.fills] == [(0.0, 0, 0), (1.5, 1, 0)]
    _, recorder = recorded(lambda place, a, b: place[:0].zero_())
    assert not recorder.fills
    assert not recorder.spoiled


@pytest.mark.parametrize(
    ("operation", "spoiled", "used"),
    [
        (lambda place, a, b: place.copy_(b), "b is broadcast into it", {"b": "broadcast"}),
        (lambda place, a, b: place.add_(a), "add_ writes into it", {"a": "add_"}),
        (lambda place, a, b: place.copy_(torch.ones(4, 6)), "copy_ writes into it", {}),
        (lambda place, a, b: place.mul_(2), "mul_ writes into it", {}),
        (lambda place, a, b: place.copy_(a.flip(0)), "copy_ writes into it", {"a": "flip"}),
        (lambda place, a, b: torch.add(a, 1, out=place), "add writes into it", {"a": "add"}),
    ],
)
def test_every_other_write_into_a_destination_spoils_it(operation, spoiled, used):
    _, recorder = recorded(operation)
    assert recorder.spoiled[0].startswith(spoiled)
    assert recorder.used == used
    assert not recorder.copies


def test_writes_into_a_source_or_a_temporary_are_noted_by_the_source():
    _, recorder = recorded(lambda place, a, b: a.mul_(2))
    assert recorder.used == {"a": "mul_"}
    temporary = torch.zeros(4, 6)

    def through_temporary(place, a, b):
        temporary.copy_(a)
        place.copy_(temporary)

    _, recorder = recorded(through_temporary)
    assert recorder.used == {"a": "copy_"}
    assert recorder.spoiled
    assert not temporary.any()


def test_what_does_not_concern_sources_or_destinations_runs_as_it_is():
    other = torch.zeros(3)
    _, recorder = recorded(lambda place, a, b: other.add_(1))
    assert other.tolist() == [1, 1, 1]
    assert not recorder.used
    assert not recorder.spoiled


def test_a_slice_of_bytes_or_of_a_tensor_with_gaps_is_read_right():
    tensor = torch.randn(4, 6)
    assert torch.equal(TensorSlice(torch.int32, (3,), (2,), 1).of(tensor), tensor.view(-1).view(torch.int32)[1:7:2])
    gaps = torch.randn(6, 4).t()
    assert torch.equal(TensorSlice(torch.float32, (6,), (1,), 6).of(gaps), gaps[1])
