"""The blocks of `docs/check.md` run as they are printed, with a stand-in for the engine that is the reader's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vgen.checks.oracle import BOUND, CLIP
from vgen.cli import main

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "check.md"
ENGINE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import transformers
from helpers.copied_model import CopiedModel


class Engine(CopiedModel):
    def sample(self, prompts, max_tokens, temperature):
        return self.generate(prompts, max_tokens=max_tokens, temperature=temperature)

    def stop(self):
        pass


def start_my_engine(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return Engine(model, folder)


def push_my_weights(model, engine):
    engine.sync(model)


"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.mark.slow
def test_the_adapter_and_the_tests_of_another_project_run(tmp_path):
    adapter, tests = blocks("python")
    (tmp_path / "test_my_sync.py").write_text(ENGINE + adapter + "\n" + tests)
    # Some of the cases: test_sync_cases.py runs them all on such an adapter.
    chosen = ["-k", "fresh or stale or untied or sleep"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_sync.py", *chosen]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"3 passed, 5 skipped", done.stdout), done.stdout


@pytest.mark.slow
def test_the_command_with_the_adapter_runs(tmp_path):
    (command,) = [command for command in commands() if "--adapter" in command]
    module, _, function = command[command.index("--adapter") + 1].partition(":")
    package, _, name = module.rpartition(".")
    (tmp_path / package).mkdir()
    (tmp_path / package / f"{name}.py").write_text(f"{ENGINE}{blocks('python')[0]}\n{function} = MyWeightSync\n")
    # Two of the cases: test_sync_cases.py runs them all on such an adapter.
    command += ["--case", "fresh sync", "--case", "tied embeddings"]
    done = subprocess.run(
        [sys.executable, "-m", "vgen.cli", *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 right" in done.stdout


def test_every_command_of_the_page_is_one_that_the_command_line_takes(capsys, monkeypatch):
    """Those that need a checkpoint or a server run in tests/real/test_check.py."""
    seen = []
    monkeypatch.setattr("vgen.checks.command.run", lambda model, **options: seen.append((model, options)) or 0)
    monkeypatch.setattr("vgen.cli._read_keys", lambda command, settings: True)
    for command in commands():
        assert command[:2] == ["vgen", "check"]
        assert main(command[1:]) == 0
    assert [options["list_cases"] for _, options in seen] == [False] * 4 + [True]
    assert [model for model, _ in seen][:2] == ["llama", "path/to/model"]


def test_the_page_says_what_the_code_does():
    text = " ".join(PAGE.read_text().split())
    assert BOUND == 4
    assert "differ by at most four times the noise" in text
    assert CLIP == 8
    assert "counts with at most eight times the noise" in text
