"""`vgen check` on real engines: in this process, against a server, and the architectures of the matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vgen import ServerGeneration
from vgen.checks.matrix import page
from vgen.checks.sync_cases import SYNC_CASES
from vgen.checks.vgen_cases import VGEN_CASES
from vgen.cli import main

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.real, pytest.mark.slow]
PAGE = ROOT / "docs" / "check.md"
MIXTURES = ("qwen3_moe", "deepseek_v2")
ARCHITECTURES = (*MIXTURES, "gemma2", "falcon_h1", "mamba2", "opt", "gpt2", "phi3", "gpt_neox", "cohere")


def check(*arguments, seconds=280):
    command = [sys.executable, "-m", "vgen.cli", "check", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


def test_in_process_every_case_is_right():
    names = [word for case in [*SYNC_CASES, *VGEN_CASES] for word in ("--case", case.name)]
    status, found = check("llama", *names)
    wrong = [case for case in found["cases"] if case["status"] not in ("right", "skipped")]
    assert not wrong
    assert status == 0
    right = [case for case in found["cases"] if case["status"] == "right"]
    assert len(right) >= 30
    assert all(case["measurement"]["ratio"] <= 4 for case in right if case["measurement"])


def test_a_server_is_checked_and_has_the_models_weights_afterwards(server, tmp_path, capfd):
    key = tmp_path / "key"
    key.write_text(server.control_key)
    api_key = ["--api-key", server.api_key] if server.api_key else []
    arguments = [server.folder, "--server", server.base_url, "--control-key-file", str(key), *api_key]
    command = "vgen check path/to/model --server http://host:8000 --yes --control-key-file KEY"
    assert command in PAGE.read_text()  # the one that runs here, with the page's stand-ins replaced
    keys = dict(api_key=server.api_key, control_key=server.control_key)
    with ServerGeneration(server.model, base_urls=server.base_url, **keys) as generation, torch.no_grad():
        kept = {name: tensor.clone() for name, tensor in server.model.state_dict().items()}
        for parameter in server.model.parameters():
            parameter.mul_(1.5)
        generation.sync_weights()
        server.model.load_state_dict(kept)
    assert main(["check", *arguments]) == 2
    said = capfd.readouterr().err
    assert f"{server.base_url} has other weights than {server.folder}" in said
    assert "say --yes" in said
    status, found = check(*arguments, "--yes")
    wrong = [case for case in found["cases"] if case["status"] not in ("right", "skipped")]
    assert not wrong
    assert status == 0
    assert sum(case["status"] == "right" for case in found["cases"]) >= 30
    assert "now; those that it had before, which were others, are lost" in found["left"]
    assert main(["check", *arguments]) == 2
    assert f"{server.base_url} has the weights of {server.folder}: " in capfd.readouterr().err
    in_flight = next(case for case in found["cases"] if case["case"] == "an update in flight")
    assert in_flight["status"] in ("right", "skipped")


ONE_AFTER_ANOTHER = """
import json, os, sys
from vgen.checks.matrix import cell
for name in sys.argv[1:]:
    print("CELL " + json.dumps([name, cell("in process", name)]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def cells():
    """All in one process, which takes less time than one for each. vLLM wants mixtures of experts first."""
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, *ARCHITECTURES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("CELL ")]
    return dict(json.loads(line.removeprefix("CELL ")) for line in lines)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_right_or_refused_as_the_page_says(cells, name):
    result = json.loads((ROOT / "docs" / "results" / "support.json").read_text())
    expected = result["cells"][name]["in process"]["status"]
    assert cells[name]["status"] == expected != "wrong", cells[name]


def test_the_page_is_the_result():
    result = json.loads((ROOT / "docs" / "results" / "support.json").read_text())
    assert (ROOT / "docs" / "support.md").read_text() == page(result)
    ways = ("in process", "server")
    assert not [
        name for name, found in result["cells"].items() for way in ways if found.get(way, {}).get("status") == "wrong"
    ]
