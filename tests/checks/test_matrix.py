"""The matrix of architectures: how cells become states and a page. tests/real/test_check.py has real cells."""

from __future__ import annotations

import json
import subprocess

import pytest

from vgen.checks import matrix
from vgen.checks.matrix import page, run, run_cell

RIGHT = {"status": "right", "detail": "", "ratio": 0.2, "largest": 1e-6}
WRONG = {"status": "wrong", "detail": "fresh sync: far off", "ratio": 90.0, "largest": 1.0}
REFUSED = {"status": "refused", "detail": "fresh sync: WeightSyncError: a | b", "ratio": None, "largest": None}
NOT_RUN = {"status": "not run", "detail": "RuntimeError: no kernel"}
CELLS = {
    "llama": {"in process": RIGHT, "server": RIGHT},
    "bloom": {"in process": REFUSED, "stock": WRONG},
    "gpt_oss": {"in process": NOT_RUN, "stock": NOT_RUN},
}


def result(**cells):
    return {"vllm": "1", "transformers": "2", "torch": "3", "cells": CELLS | cells}


def test_a_page_has_a_row_for_each_and_counts_them():
    text = page(result())
    assert "| `llama` | LlamaForCausalLM | right, 0.2 |  | right, 0.2 |  |" in text
    assert "fresh sync: WeightSyncError: a / b. vLLM alone: wrong, 90 |" in text
    assert "RuntimeError: no kernel. vLLM alone: cannot run it |" in text
    counts = "Of 3, 1 are right, 1 are refused (50 % of those that vLLM runs), and 1 are not run by vLLM on a CPU."
    assert counts in " ".join(text.split())


def test_what_is_right_in_bfloat16_is_not_refused():
    text = page(result(bloom={"in process": REFUSED, "stock": WRONG, "bfloat16": RIGHT}))
    assert "2 are right, 0 are refused" in " ".join(text.split())
    assert "| refused | right, 0.2 |" in text


def test_what_vllm_alone_runs_counts_as_refused():
    text = " ".join(page(result(gpt_oss={"in process": NOT_RUN, "stock": RIGHT})).split())
    assert "1 are right, 2 are refused" in text


def test_a_run_writes_each_cell_and_says_if_one_is_wrong(monkeypatch, tmp_path, capsys):
    asked = []

    def answer(way, model_type):
        asked.append((way, model_type))
        return {"llama": RIGHT, "opt": NOT_RUN, "phi3": WRONG}[model_type]

    monkeypatch.setattr(matrix, "run_cell", answer)
    out = tmp_path / "support.json"
    assert run(out, ["llama", "opt"], parallel=1) == 0
    assert asked == [
        ("in process", "llama"),
        ("server", "llama"),
        ("in process", "opt"),
        ("stock", "opt"),
        ("server", "opt"),
    ]
    assert set(json.loads(out.read_text())["cells"]) == {"llama", "opt"}
    assert run(out, ["llama", "phi3"], servers=False) == 1
    assert "phi3" in capsys.readouterr().out


def test_a_cell_that_gives_no_result_says_why(monkeypatch):
    class Done:
        stdout, stderr, returncode = "", "one\nSegmentation fault", -11

    monkeypatch.setattr(subprocess, "run", lambda *args, **options: Done)
    assert run_cell("in process", "llama") == {
        "status": "not run",
        "detail": "the process ended with -11: Segmentation fault",
    }

    def timeout(*args, **options):
        raise subprocess.TimeoutExpired("x", 1)

    monkeypatch.setattr(subprocess, "run", timeout)
    assert run_cell("in process", "llama")["status"] == "not run"


@pytest.mark.slow
@pytest.mark.real
def test_the_list_is_of_classes_that_both_know():
    names = matrix.known_to_both()
    assert {"llama", "qwen3_moe", "gemma3_text", "mamba2"} <= set(names)
    assert len(names) >= 60
    classes = [matrix.architectures()[name] for name in names]
    assert len(set(classes)) == len(classes)
