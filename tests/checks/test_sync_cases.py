"""The portable cases pass for a right weight sync, and each way to break one is caught by a case."""

from __future__ import annotations

import pytest
import torch
from helpers.copied_model import CopiedModel

from vgen.checks.architectures import tiny_model
from vgen.checks.session import Session
from vgen.checks.sync_cases import SYNC_CASES

CASES = {case.name: case for case in SYNC_CASES}


class Sleeping(CopiedModel):
    """Its sleep discards all that it has."""

    concurrent = True

    def sleep(self, level):
        if level == 2:
            for tensor in self.engine.state_dict().values():
                tensor.zero_()

    def wake_up(self):
        pass


class ForgetsBiasesAndNorms(Sleeping):
    def weights_of(self, model):
        new = model.state_dict()
        return {n: self.engine.state_dict()[n] if t.dim() == 1 else t for n, t in new.items()}


class SendsWhatIsTrained(Sleeping):
    def weights_of(self, model):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {n: t if n in trained else self.engine.state_dict()[n] for n, t in model.state_dict().items()}


class RemembersTensors(Sleeping):
    def weights_of(self, model):
        if not hasattr(self, "remembered"):
            self.remembered = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        return self.remembered


class LosesTheHead(Sleeping):
    def weights_of(self, model):
        return model.state_dict() | {"lm_head.weight": self.engine.state_dict()["lm_head.weight"]}


class SyncsTwice(Sleeping):
    syncs = 0

    def sync(self, model):
        self.syncs += 1
        if self.syncs <= 2:
            super().sync(model)


class KeepsAfterSleep(Sleeping):
    """Sends only what has changed since the last sync."""

    def weights_of(self, model):
        new, last = model.state_dict(), getattr(self, "last", {})
        self.last = {name: tensor.clone() for name, tensor in new.items()}
        kept = self.engine.state_dict()
        return {n: kept[n] if n in last and torch.equal(last[n], t) else t for n, t in new.items()}


class DropsBiasesSilently(Sleeping):
    def sync(self, model):
        known = self.engine.state_dict().keys()
        self.engine.load_state_dict({name: t for name, t in model.state_dict().items() if name in known})


class RoundsToBfloat16(Sleeping):
    def weights_of(self, model):
        return {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}


class ReadsBytesInOrder(Sleeping):
    def weights_of(self, model):
        tensors = model.state_dict().items()
        return {n: t.as_strided(t.shape, torch.empty(t.shape).stride()) if t.dim() == 2 else t for n, t in tensors}


class HalfAnUpdate(Sleeping):
    """A sync that fails leaves what it had written, and the next one goes on where it ended."""

    done = frozenset[str]()

    def sync(self, model):
        places = self.engine.state_dict()
        for name, tensor in model.state_dict().items():
            if name not in self.done:
                if tensor.is_meta:
                    self.done = self.done | {n for n in places if n < name}
                    raise ValueError(name)
                places[name].copy_(tensor)
        self.done = frozenset()


def made():
    return tiny_model("llama", seed=1, num_key_value_heads=4)


@pytest.fixture
def model():
    return made()


@pytest.fixture(scope="module")
def session():
    """A session with a right weight sync. Afterwards the model is as it was, but for its values."""
    model = made()
    shapes = {name: (p.shape, p.stride(), p.requires_grad) for name, p in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    with Session(model, Sleeping, abilities={"more engines"}) as session:
        yield session
    assert {name: (p.shape, p.stride(), p.requires_grad) for name, p in model.named_parameters()} == shapes
    assert [type(module) for module in model.modules()] == kinds
    assert not model.training


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_right_weight_sync_passes(session, name):
    outcome = session.run(CASES[name])
    assert outcome.status in ("right", "skipped"), outcome
    assert outcome.status == "right" or name == "an update in flight"  # the generation may be over before


BROKEN = {
    ForgetsBiasesAndNorms: "only norms and biases are new",
    SendsWhatIsTrained: "half of the weights frozen",
    RemembersTensors: "storage replaced",
    LosesTheHead: "only the output head is new",
    SyncsTwice: "second and third sync",
    KeepsAfterSleep: "sleep level 2, unchanged weights",
    DropsBiasesSilently: "a tensor too many",
    RoundsToBfloat16: "fresh sync",
    ReadsBytesInOrder: "weights that are not contiguous",
    HalfAnUpdate: "a sync that breaks off, and the next",
}


@pytest.mark.parametrize(("subject", "name"), BROKEN.items())
def test_a_broken_weight_sync_is_caught(model, subject, name):
    with Session(model, subject) as session:
        outcome = session.run(CASES[name])
    assert outcome.status == "wrong", outcome
    assert outcome.measurement is not None
    assert not outcome.measurement.right


def test_every_case_has_a_summary_a_cause_and_a_fix():
    assert len(CASES) == len(SYNC_CASES) >= 30
    for case in SYNC_CASES:
        assert case.summary.endswith(".")
        assert case.cause
        assert case.fix
