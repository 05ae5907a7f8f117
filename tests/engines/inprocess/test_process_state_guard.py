"""What vLLM changes in a process is restored; its random numbers are its own."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgen.engines.inprocess import process_state_guard
from vgen.engines.inprocess.process_state_guard import (
    EngineRandomState,
    ProcessGroup,
    unchanged_process,
    without_cudnn_attention,
)


def numbers() -> tuple:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def as_vllm_does() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_num_threads = lambda count: None
    os.environ["ADDED_BY_VLLM"] = "1"
    os.environ["CHANGED_BY_VLLM"] = "theirs"
    os.environ.pop("REMOVED_BY_VLLM", None)


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_as_before_also_after_an_error(monkeypatch, fails):
    monkeypatch.setenv("CHANGED_BY_VLLM", "mine")
    monkeypatch.setenv("REMOVED_BY_VLLM", "mine")
    threads, set_num_threads, affinity = torch.get_num_threads(), torch.set_num_threads, os.sched_getaffinity(0)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = numbers()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    try:
        with unchanged_process():
            as_vllm_does()
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert numbers() == expected
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert (torch.set_num_threads, torch.get_num_threads()) == (set_num_threads, threads)
    assert os.sched_getaffinity(0) == affinity
    assert "ADDED_BY_VLLM" not in os.environ
    assert (os.environ["CHANGED_BY_VLLM"], os.environ["REMOVED_BY_VLLM"]) == ("mine", "mine")


def test_the_engine_alone_goes_without_cudnns_attention():
    with without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_engine_and_trainer_draw_from_states_of_their_own():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = [float(torch.rand(())) for _ in range(4)]
        torch.manual_seed(2)
        trainers = [float(torch.rand(())) for _ in range(4)]
        torch.manual_seed(1)
        engine = EngineRandomState()
        torch.manual_seed(2)
        drawn = []
        for number in trainers:  # in turn with the trainer, each goes on with its own
            with engine.installed():
                drawn.append(float(torch.rand(())))
            assert float(torch.rand(())) == number
        assert drawn == expected


@pytest.mark.fault(
    point="the engine in the trainer's process",
    did="The engine raises",
    happens="The trainer's random and autocast states are as before",
    within=20,
)
def test_an_error_in_the_engine_leaves_the_trainer_its_state():
    with torch.random.fork_rng(devices=[]):
        engine = EngineRandomState()
        before = torch.get_rng_state()
        with suppress(RuntimeError), engine.installed():
            torch.rand(())
            raise RuntimeError
        assert torch.equal(torch.get_rng_state(), before)


def test_a_group_that_an_llm_of_the_users_own_has_destroyed_is_forgotten(monkeypatch):
    """vLLM destroys all groups of the process when an engine of it ends; the next engine of vgen makes new ones."""
    pytest.importorskip("vllm")
    destroyed = SimpleNamespace(_WORLD=None, destroy_model_parallel=lambda: None)
    destroyed.destroy_distributed_environment = lambda: None
    monkeypatch.setattr(process_state_guard, "_parallel_state", lambda: destroyed)
    groups = ProcessGroup()
    groups._group = object()  # none that torch knows
    with groups.joined(), groups.installed():
        assert not torch.distributed.is_initialized()
    groups.release()
