"""The classes of the trainer's model stay as they are while vLLM builds an engine from them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from vgen import EngineError
from vgen.engines.inprocess import class_guard
from vgen.engines.inprocess.class_guard import unchanged_classes


class Parent(torch.nn.Module):
    recorded: ClassVar[dict[str, int]] = {"a": 1}
    limit = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Decoder(Parent):
    def forward(self, x: torch.Tensor, *, scale: int = 2) -> torch.Tensor:
        return super().forward(x) * scale


class Compiled:
    """What a decoration adds as a base."""


def decorated(kind: Any) -> None:
    """Changes a class as vLLM's `support_torch_compile` does."""
    init = kind.__init__

    def __init__(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self.do_not_compile = True

    def __call__(self: Any, *arguments: Any) -> Any:
        assert self.do_not_compile
        return self.forward(*arguments)

    kind.__bases__ = (*kind.__bases__, Compiled)
    kind.__init__, kind.__call__ = __init__, __call__


class Backend:
    """vLLM's transformers backend, as far as the guard knows it."""

    def __init__(self) -> None:
        self._decorate_cls_for_torch_compile(cls=Decoder)
        self.model = torch.nn.Sequential(Decoder())
        self._create_hf_to_vllm_mapper()

    def _decorate_cls_for_torch_compile(self, cls: type) -> None:
        decorated(cls)

    def _create_hf_to_vllm_mapper(self) -> None:
        self.mapped = type(self.model[0])


@pytest.fixture
def backend(monkeypatch) -> type[Backend]:
    module: Any = ModuleType("backend")
    module.Base = Backend
    monkeypatch.setitem(sys.modules, "backend", module)
    monkeypatch.setattr(class_guard, "_BACKEND", "backend")
    return Backend


def test_the_engine_gets_a_subclass_and_the_trainer_keeps_its_class(backend):
    trainer, x = Decoder(), torch.ones(2)
    before, methods = dict(vars(Decoder)), dict(vars(Backend))
    with unchanged_classes(trainer.modules()):
        engine = backend()
    assert dict(vars(Decoder)) == before
    assert Decoder.__bases__ == (Parent,)
    assert dict(vars(Backend)) == methods
    assert torch.equal(trainer(x), Decoder()(x))  # a further model of the class can be made, too
    (own,) = engine.model
    assert type(own) is engine.mapped  # the backend saw the subclass from the start
    assert issubclass(engine.mapped, Decoder)
    assert issubclass(engine.mapped, Compiled)
    assert str(engine.mapped) == str(Decoder)  # transformers looks classes up by this
    assert own.do_not_compile
    assert torch.equal(own(x), trainer(x))


def test_the_engines_forward_has_a_code_object_of_its_own(backend):
    """vLLM exchanges the code of the function, and torch.compile's cache belongs to a code object."""
    with unchanged_classes([Decoder()]):
        (own,) = backend().model
    assert type(own).forward.__code__ is not Decoder.forward.__code__
    assert torch.equal(own.forward(torch.ones(1), scale=5), Decoder().forward(torch.ones(1), scale=5))


@pytest.mark.fault(
    point="the engine in the trainer's process",
    did="vLLM changes the trainer's class",
    happens="It is restored, and the engine refused",
    within=20,
)
def test_a_class_that_is_changed_in_another_way_is_restored_and_the_engine_refused():
    trainer = torch.nn.Sequential(Decoder())
    before = dict(vars(Decoder))
    with pytest.raises(EngineError, match=r"changed .*Decoder.*vgen serve"), unchanged_classes(trainer.modules()):
        decorated(Decoder)
    assert dict(vars(Decoder)) == before
    assert Decoder.__bases__ == (Parent,)
    assert torch.equal(trainer(torch.ones(1)), torch.full((1,), 4.0))


def test_data_of_a_class_is_restored_and_the_engine_works():
    with unchanged_classes([Decoder()]):
        Parent.recorded["b"] = 2
        Parent.limit = 4
        Decoder.added = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert (Parent.recorded, Parent.limit, hasattr(Decoder, "added")) == ({"a": 1}, 3, False)


def test_an_error_of_the_engine_is_raised_as_it_is_and_the_class_restored(backend):

    def fail() -> None:
        with unchanged_classes([Decoder()]):
            decorated(Decoder)
            raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        fail()
    assert Decoder.__bases__ == (Parent,)
    assert torch.equal(Decoder()(torch.ones(1)), torch.full((1,), 4.0))
