"""Whether destinations still hold what a source yields, compared without copying."""

from __future__ import annotations

import pytest
import torch
from helpers.loader_models import LoaderModel, metadata_of_stream, random_weights

from vgen import WeightSyncError
from vgen.weights import source_of
from vgen.weights.load.load_record import make_record
from vgen.weights.load.record_check import require_equal


@pytest.fixture
def loaded():
    """A record, and the weights that were loaded by it."""
    model, stream = LoaderModel(), random_weights()
    record = make_record(model, metadata_of_stream(stream))
    model.load_weights(iter(stream))
    return record, dict(stream)


def test_equal_weights_are_counted_and_left_alone(loaded):
    record, weights = loaded
    places = [copy.place.clone() for copies in record.copies.values() for copy in copies]
    assert require_equal(record, source_of(weights), "engine") == len(weights)
    after = [copy.place for copies in record.copies.values() for copy in copies]
    assert all(map(torch.equal, places, after))


@pytest.mark.parametrize("name", ["q", "k", "embed"])
def test_one_changed_element_is_named_by_its_destination(loaded, name):
    record, weights = loaded
    weights[name] = weights[name].clone()
    weights[name].flatten()[-1] += 1
    with pytest.raises(WeightSyncError, match="differs from the trainer's model as that is now") as caught:
        require_equal(record, source_of(weights), "engine")
    assert (caught.value.phase, caught.value.receiver) == ("verify", "engine")
    assert caught.value.parameter in {record.names[copy.target] for copy, _ in record.of(name)}


def test_another_shape_and_a_missing_tensor_are_named(loaded):
    record, weights = loaded
    for change, match in ((weights | {"q": weights["q"][:1]}, "shape or dtype"), ({"q": weights["q"]}, "not provide")):
        with pytest.raises(WeightSyncError, match=match):
            require_equal(record, source_of(change), "engine")
