"""`vgen check` as a command: adapters, exit codes, one line for each error. tests/real has real engines."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vgen import EngineError
from vgen.checks import vgen_subjects
from vgen.checks.command import all_cases
from vgen.checks.oracle import Measurement
from vgen.cli import main

TESTS = Path(__file__).parents[1]
CASES = ("fresh sync", "the check sees a stale layer", "warm prefix cache")


@pytest.fixture
def check(capfd, monkeypatch):
    """`vgen check llama` with an adapter of the module `odd`, below; returns the status and what was printed."""
    monkeypatch.syspath_prepend(str(TESTS / "helpers"))

    def run(adapter, *arguments):
        status = main(["check", "llama", "--adapter", f"odd_subjects:{adapter}", *arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return run


def cases(*names):
    return [word for name in names for word in ("--case", name)]


def test_a_right_adapter_gives_0_and_a_line_for_each_case(check):
    status, out, _ = check("Right", *cases(*CASES))
    assert status == 0, out
    lines = [line for line in out.splitlines() if "WARNING" not in line]  # of libraries, as they are imported
    assert [line[:8].strip() for line in lines[:3]] == ["right"] * 3
    assert all(case in line for case, line in zip(CASES, lines, strict=False))
    assert "3 right" in lines[-1]


def test_json_is_one_object_and_nothing_else(check):
    found = json.loads(check("Right", "--json", *cases(*CASES))[1])
    assert [case["status"] for case in found["cases"]] == ["right"] * 3
    assert (found["model"], found["dtype"], found["error"]) == ("llama", "torch.float32", None)


def test_a_wrong_engine_gives_1_with_the_usual_cause(check):
    status, out, _ = check("Stale", *cases("fresh sync"))
    assert status == 1
    assert "WRONG    fresh sync" in out
    assert "usual cause:" in out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Raises", "ERROR fresh sync: OSError: no engine"),
        ("Short", "returned 0 completions: return one for each prompt"),
        ("Missing", "vgen check: --adapter odd_subjects:Missing"),
    ],
)
def test_an_adapter_that_misbehaves_gives_2_and_says_so(check, name, says):
    status, out, err = check(name, *cases("fresh sync"))
    assert status == 2, out + err
    assert says in out + err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_an_adapter_that_hangs_ends_the_process_with_2():
    command = [sys.executable, "-m", "vgen.cli", "check", "llama", "--adapter", "odd_subjects:Hangs", "--timeout", "9"]
    done = subprocess.run(
        [*command, *cases("fresh sync")], capture_output=True, text=True, cwd=TESTS / "helpers", timeout=60
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "vgen check: the case fresh sync did not end within 9 s" in done.stdout
    assert "printed by the adapter" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check"], "name a MODEL"),
        (["check", "no-such-thing"], "neither a folder with a config.json nor an architecture"),
        (["check", "nobody/nothing-at-all"], "cannot be loaded"),
        (["check", "llama", "--case", "no such case"], "there is no case 'no such case'"),
        (["check", "llama", "--server", "http://127.0.0.1:9"], "say --yes"),
        (["check", "llama", "--server", "http://127.0.0.1:9", "--yes"], "127.0.0.1:9"),
        (["check", "llama", "--server", "https://127.0.0.1:9", "--yes"], "not an address like http"),
        (["check", "llama", "--server", "http://a", "--adapter", "a:b"], "exclude each other"),
        (["check", "llama", "--adapter", "no.such.module:x"], "--adapter no.such.module:x"),
        (["check", "llama", "--server", "http://a", "--yes", "--api-key-file", "/no/file"], "cannot read /no/file"),
    ],
)
def test_a_call_that_cannot_work_gives_2_and_one_line(arguments, says, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    (line,) = [line for line in (out + err).splitlines() if line.startswith("vgen check: ")]
    assert says in line
    assert "Traceback" not in out + err


HELD = Measurement(ratio=0.5, bound=4.0, mean=0.0, largest=0.0, noise=1.0, tokens=8)


@pytest.mark.parametrize(
    ("held", "before", "after"),
    [
        (HELD, "http://s has the weights of llama: the check overwrites them", "has the weights of llama again"),
        (
            replace(HELD, ratio=90.0),
            "has other weights than llama (log-probabilities differ by 90 times the rounding noise, where 4 is",
            "now; those that it had before, which were others, are lost",
        ),
        (EngineError("asleep"), "is unknown (asleep)", "now; whether it had them before is unknown"),
    ],
)
def test_what_a_server_has_is_said_before_it_is_overwritten_and_what_is_left(held, before, after, monkeypatch, capfd):
    def now(*_, **__):
        if isinstance(held, Exception):
            raise held
        return held

    monkeypatch.syspath_prepend(str(TESTS / "helpers"))
    subject = importlib.import_module("odd_subjects").Right
    made = []
    monkeypatch.setattr(vgen_subjects, "held_by_server", now)
    monkeypatch.setattr(vgen_subjects, "server", lambda *_, **__: lambda *each: made.append(1) or subject(*each))
    arguments = ["check", "llama", "--server", "http://s", *cases("fresh sync")]
    assert main(arguments) == 2
    said = capfd.readouterr().err
    assert before in said
    assert ("the present ones will be lost" in said) == (held is not HELD)
    assert not made
    assert main([*arguments, "--yes"]) == 0
    out = capfd.readouterr().out
    assert before in out.partition("fresh sync")[0]
    assert after in out.splitlines()[-1]


def test_the_list_has_every_case_once(capsys):
    assert main(["check", "--list"]) == 0
    listed = capsys.readouterr().out
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert all(f"{name}\n" in listed or f"{name}  [" in listed for name in names)
    assert main(["check", "--list", "--json"]) == 0
    assert [case["name"] for case in json.loads(capsys.readouterr().out)] == names


def test_thirty_cases_run_on_a_cpu_in_process_and_fifteen_more_on_a_gpu():
    in_process = frozenset({"vgen", "in process", "more engines", "other architectures", "sleep mode"})
    server = frozenset({"vgen", "server", "updates in flight", "sleep mode"})
    on_cpu = [case for case in all_cases() if case.needs <= in_process]
    assert len(on_cpu) >= 30
    assert len([case for case in all_cases() if case.needs <= server]) >= 30
    assert len([case for case in all_cases() if case.needs <= in_process | {"CUDA"}]) >= len(on_cpu) + 15
