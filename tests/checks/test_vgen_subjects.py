"""vgen's generation objects as subjects."""

from __future__ import annotations

import pytest
import torch

from vgen import Generation
from vgen.checks.architectures import tiny_model
from vgen.checks.vgen_subjects import VgenSubject, engine_options, server, server_arguments
from vgen.errors import CheckError
from vgen.testing import FakeEngine


@pytest.fixture
def subject():
    model = torch.nn.Linear(2, 2)
    return model, VgenSubject(model, Generation(FakeEngine(), model))


def test_calls_go_to_the_generation_object(subject):
    model, subject = subject
    engine = subject.generation.engine
    assert subject.sync(model).version == "1"
    assert set(engine.weights) == {"weight", "bias"}
    assert subject.generate([[1, 2, 3]], max_tokens=2, temperature=0.0) == [([1, 2], [0.0, 0.0])]
    subject.sleep(1)
    subject.wake_up()
    subject.close()
    assert [call for call in engine.calls if call in ("sleep", "wake_up", "close")] == ["sleep", "wake_up", "close"]


def test_another_model_takes_the_sources_place(subject):
    _, subject = subject
    other = torch.nn.Linear(3, 3)
    subject.sync(other)
    assert subject.generation.engine.weights["weight"].shape == (3, 3)


def test_models_with_a_state_have_no_prefix_cache_on_a_cpu():
    assert engine_options(tiny_model("llama")) == {}
    assert engine_options(tiny_model("mamba2")) == {"enable_prefix_caching": False}
    assert server_arguments(tiny_model("falcon_h1")) == ["--no-enable-prefix-caching"]


def test_a_server_that_is_not_there_is_named_by_its_own_address():
    make = server("http://127.0.0.1:9", api_key=None, control_key=None, timeout=5)
    with pytest.raises(CheckError, match=r"http://127.0.0.1:9: .*vgen serve"):
        make(torch.nn.Linear(1, 1), "")
