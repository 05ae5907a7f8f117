"""A small model with a loader like those of vLLM's models, and what the tests of recorded loads do with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vgen.weights.load import recorded_copy
from vgen.weights.load.load_record import LoadRecord
from vgen.weights.load.recorded_copy import RecordedCopy
from vgen.weights.source.module_source import source_of

SHAPES = {"q": (4, 8), "k": (2, 8), "embed": (10, 8), "head": (10, 8)}
Stream = list[tuple[str, torch.Tensor]]


class LoaderModel(nn.Module):
    """q and k become one weight; the embedding has two rows of padding, and the head may share its weight."""

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


def random_weights(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Stream:
    """Fresh weights for a `LoaderModel`; if `tied`, with one tensor under both names."""
    stream = {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
    if tied:
        stream["head"] = stream["embed"]
    return list(stream.items())


def metadata_of_stream(stream: Stream) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in stream]


def replay(record: LoadRecord, stream: Stream) -> None:
    """What the record says, by plain copies."""
    with torch.no_grad():
        for fill in record.fills:
            fill.place.fill_(fill.value)
        for name, tensor in stream:
            for copy in record.copies.get(name, ()):
                copy.place.copy_(copy.part.of(tensor))


def fill_with_nan(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


def runner_of(model: nn.Module) -> Any:
    """What a `RecordedCopy` uses of vLLM's model runner."""
    return SimpleNamespace(get_model=lambda: model, reset_lora_state=lambda: None)


def loaded(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[RecordedCopy, Any]:
    """A `RecordedCopy` that has loaded `model` once, and its runner.

    The allowlist and the verification of the record need vLLM; here they pass every model.
    """
    monkeypatch.setattr(recorded_copy, "layout_change", lambda module: None)
    monkeypatch.setattr(recorded_copy, "verify_record", lambda *_: None)
    copier, runner = RecordedCopy(**options), runner_of(model)
    copier.load(runner, source_of(random_weights(tied=True)))
    assert copier.recorded
    return copier, runner
