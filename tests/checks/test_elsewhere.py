"""Cases in other processes: their outcomes are taken over, and what ends without one is an error."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from vgen.checks import elsewhere as other_process
from vgen.checks.elsewhere import check_elsewhere, own_engine
from vgen.checks.engine_cases import ENGINE_CASES
from vgen.checks.session import Case, WrongWeights
from vgen.errors import CheckError

CASES = {case.name: case for case in ENGINE_CASES}


def outcome(status, ratio=0.5):
    return {"case": "x", "status": status, "detail": "so it was", "measurement": {"ratio": ratio} if ratio else None}


@pytest.fixture
def elsewhere(monkeypatch):
    def answer(*outcomes):
        monkeypatch.setattr(other_process, "check_elsewhere", lambda *args: list(outcomes))
        bench = SimpleNamespace(note="", session=SimpleNamespace(timeout=100))
        CASES["a mixture of experts"].run(bench)
        return bench.note

    return answer


def test_right_outcomes_elsewhere_are_right_here(elsewhere):
    assert elsewhere(outcome("right"), outcome("skipped", None), outcome("right", 0.7)) == (
        "2 cases, at most 0.7 times the noise"
    )


def test_others_are_not(elsewhere):
    with pytest.raises(WrongWeights, match="x: so it was"):
        elsewhere(outcome("right"), outcome("wrong"))
    for status in ("refused", "error"):
        with pytest.raises(CheckError, match=f"qwen3_moe: x: {status}: so it was"):
            elsewhere(outcome("right"), outcome(status))


@pytest.mark.parametrize(
    ("abilities", "child", "where"), [({"CUDA"}, False, "elsewhere"), ({"CUDA"}, True, "here"), (set(), False, "here")]
)
def test_an_engine_that_sleeps_has_a_cuda_process_to_itself(monkeypatch, abilities, child, where):
    ran = []
    monkeypatch.setattr(other_process, "check_elsewhere", lambda *args: ran.append(args) or [outcome("right")])
    if child:
        monkeypatch.setenv(other_process.ELSEWHERE, "1")
    model = SimpleNamespace(config=SimpleNamespace(model_type="opt"), parameters=lambda: iter([torch.ones(1)]))
    bench = SimpleNamespace(session=SimpleNamespace(abilities=abilities, timeout=100), model=model, note="")
    own_engine(Case("x", "X.", lambda bench: ran.append("here"), "", "")).run(bench)
    assert ran == (["here"] if where == "here" else [("opt", "float32", ("x",), 90)])


@pytest.fixture
def process(monkeypatch):
    def ends(stdout="", stderr="", returncode=0, error=None):
        def run(command, **options):
            if error:
                raise error
            return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=returncode)

        monkeypatch.setattr(subprocess, "run", run)
        return lambda: check_elsewhere("opt", "float32", ["fresh sync"], 5)

    return ends


def test_a_process_that_says_nothing_useful_is_an_error(process):
    with pytest.raises(CheckError, match="did not end within 5 s"):
        process(error=subprocess.TimeoutExpired("x", 5))()
    with pytest.raises(CheckError, match="ended with 137 and said killed"):
        process(stderr="a\nkilled", returncode=137)()
    with pytest.raises(CheckError, match="said nothing"):
        process(stdout="no json")()
    with pytest.raises(CheckError, match="the engine could not be started"):
        process(stdout=json.dumps({"error": "the engine could not be started", "cases": []}))()
    assert process(stdout="noise\n" + json.dumps({"error": None, "cases": [1]}))() == [1]
