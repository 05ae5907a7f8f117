"""The stream of a reload: which name is behind a tensor. The reload itself runs in the tests with real vLLM."""

from __future__ import annotations

import pytest
import torch

from vgen import WeightSyncError
from vgen.weights.load.layerwise_reload import NamedStream


def test_a_tensor_and_views_of_its_beginning_have_the_name_that_it_came_under():
    tensors = {"a": torch.zeros(4, 2), "b": torch.zeros(3)}
    stream = NamedStream(tensors.items())
    for name, tensor in stream:
        assert stream.last == name
        assert stream.name_of(tensor) == stream.name_of(tensor.t()) == name
    assert stream.last is None
    assert stream.name_of(torch.zeros(1)) is None
    assert stream.name_of("a") is None


@pytest.mark.fault(
    point="a reload by the engine's own loader",
    did="A tensor is not as it was announced",
    happens="`WeightSyncError` names it",
    within=60,
)
def test_a_tensor_that_is_not_as_was_said_or_does_not_come_is_an_error():
    layouts = {"a": ((2,), torch.float32), "b": ((3,), torch.float32), "tied": ((2,), torch.float32)}
    stream = NamedStream([("a", torch.zeros(2)), ("tied", torch.zeros(2))], layouts=layouts, without={"tied"})
    assert [name for name, _ in stream] == ["a"]
    with pytest.raises(WeightSyncError, match="does not provide it") as caught:
        stream.require_all()
    assert caught.value.parameter == "b"
    for name, tensor in (("a", torch.zeros(3)), ("a", torch.zeros(2).half()), ("c", torch.zeros(2))):
        with pytest.raises(WeightSyncError, match="came, where") as caught:
            list(NamedStream([(name, tensor)], layouts=layouts))
        assert caught.value.parameter == name


@pytest.mark.fault(
    point="a reload by the engine's own loader",
    did="A tensor holds NaN",
    happens="It is named",
    within=60,
)
def test_tensors_that_are_not_finite_are_named():
    stream = NamedStream([("a", torch.zeros(2)), ("b", torch.tensor([1.0, float("nan")]))], finite=True)
    list(stream)
    assert stream.not_finite is not None
    assert stream.not_finite.names() == ("b",)


def test_the_name_at_which_a_stream_breaks_off_is_the_last():
    def breaks():
        yield "a", torch.zeros(1)
        yield "b", torch.zeros(1)
        raise OSError

    stream = NamedStream(breaks())
    try:
        list(stream)
    except OSError:
        assert stream.last == "b"
    else:
        raise AssertionError


def test_parts_follow_each_other_and_what_was_copied_keeps_its_name():
    first, second = torch.zeros(2), torch.ones(2)
    stream = NamedStream([("a", first)])
    list(stream)
    copy = first.clone()
    stream.moved({copy.data_ptr(): "a"})
    stream.follow([("b", second)])
    list(stream)
    assert stream.name_of(copy) == "a"
    assert stream.name_of(second) == "b"
    assert stream.name_of(first) is None  # its memory may be reused
