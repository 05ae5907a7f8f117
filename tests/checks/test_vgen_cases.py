"""Cases of vgen's own promises fail where a generation object breaks them. tests/real has real engines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.copied_model import CopiedModel

from vgen import Completion, WeightSyncError
from vgen.checks.architectures import tiny_model
from vgen.checks.session import Session
from vgen.checks.vgen_cases import VGEN_CASES

CASES = {case.name: case for case in VGEN_CASES}


class Generation:
    """As much of a generation object as the cases use, over a copied model."""

    weight_version = "0"
    label = None
    sees = True

    def __init__(self, subject):
        self.subject = subject

    def sync_weights(self, version="1", verify=None):
        for name, parameter in self.subject.model.named_parameters():
            if verify is not None and self.sees and not parameter.isfinite().all():
                raise WeightSyncError("is NaN", phase="load", parameter=name)
        CopiedModel.sync(self.subject, self.subject.model)
        self.weight_version = version
        return SimpleNamespace(verified="logprobs")

    def verify(self):
        ours, theirs = self.subject.model.state_dict(), self.subject.engine.state_dict()
        if self.sees and not all(torch.equal(ours[name], theirs[name]) for name in ours):
            raise WeightSyncError("a weight is stale", phase="verify")

    def generate(self, prompts, sampling):
        return [
            Completion(
                prompt_index=i,
                generation_index=0,
                token_ids=ids,
                logprobs=logprobs,
                weight_version=self.label or self.weight_version,
            )
            for i, (ids, logprobs) in enumerate(
                self.subject.generate(prompts, max_tokens=sampling.max_tokens, temperature=sampling.temperature)
            )
        ]

    def stream(self, prompts, sampling):
        return reversed(self.generate(prompts, sampling))


class Blind(Generation):
    sees = False


class Mislabels(Generation):
    label = "0"


class Shuffles(Generation):
    def stream(self, prompts, sampling):
        answers = self.generate(prompts, sampling)
        return (SimpleNamespace(prompt_index=i, token_ids=c.token_ids, logprobs=c.logprobs)
                for i, c in enumerate(reversed(answers)))  # fmt: skip


def outcome_of(kind, name):
    class Subject(CopiedModel):
        def __init__(self, model, folder):
            super().__init__(model, folder)
            self.model, self.generation = model, kind(self)

    with Session(tiny_model("llama", seed=1), Subject, abilities={"vgen", "in process"}) as session:
        return session.run(CASES[name])


RIGHT = ("version labels", "verification finds a stale layer", "a weight that is NaN", "streamed completions")


@pytest.mark.parametrize("name", RIGHT)
def test_what_keeps_its_promises_is_right(name):
    assert outcome_of(Generation, name).status == "right"


@pytest.mark.parametrize(
    ("kind", "name", "status", "says"),
    [
        (Mislabels, "version labels", "wrong", "are labelled"),
        (Blind, "verification finds a stale layer", "wrong", "verify() passed with a stale layer"),
        (Blind, "a weight that is NaN", "wrong", "a NaN weight passed a verified sync"),
        (Shuffles, "streamed completions", "wrong", "times the rounding noise"),
    ],
)
def test_a_broken_promise_is_found(kind, name, status, says):
    outcome = outcome_of(kind, name)
    assert outcome.status == status
    assert says in outcome.detail


def test_every_case_is_for_vgen_and_says_what_it_does():
    assert len(CASES) == len(VGEN_CASES)
    for case in VGEN_CASES:
        assert "vgen" in case.needs
        assert case.summary.endswith(".")
