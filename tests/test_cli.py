"""The `vgen` command line: what each command is called with, and what a wrong command line says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vgen
from vgen.cli import EXPORTS, main


class Called(SimpleNamespace):
    """The arguments of the one call of a command's `run`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch):
    """Replace the function `name` of a module by one that only records its arguments, and returns 7."""

    def replace(module: Any, name: str = "run") -> Called:
        call = Called(args=(), kwargs={})

        def record(*args: Any, **kwargs: Any) -> int:
            call.args, call.kwargs = args, kwargs
            return 7

        monkeypatch.setattr(module, name, record)
        return call

    return replace


def test_demo(called):
    from vgen import demo

    call = called(demo)
    assert main(["demo"]) == 7
    assert call.kwargs == {"steps": 3, "out": None, "model": None, "as_json": False}
    main(["demo", "--steps", "5", "--out", "o", "--model", "m", "--json"])
    assert call.kwargs == {"steps": 5, "out": Path("o"), "model": Path("m"), "as_json": True}


def test_trace(called):
    from vgen.recordings.export import command

    call = called(command)
    assert main(["trace", "r"]) == 7
    assert call.args == (Path("r"),)
    assert call.kwargs == {"step": None, "files": {}, "follow": False}
    main(["trace", "r", "--step", "4", "--follow", *(part for name in EXPORTS for part in (f"--{name}", f"f.{name}"))])
    assert call.kwargs["files"] == {name: Path(f"f.{name}") for name in EXPORTS}
    assert (call.kwargs["step"], call.kwargs["follow"]) == (4, True)


def test_report(called):
    from vgen.recordings.report import command

    call = called(command)
    assert main(["report", "r"]) == 7
    assert call.args == (Path("r"),)
    assert call.kwargs == {"step": None, "as_json": False, "compare_with": None, "threshold": 10.0}
    main(["report", "r", "--step", "1", "--json", "--compare", "other", "--threshold", "2.5"])
    assert call.kwargs == {"step": 1, "as_json": True, "compare_with": Path("other"), "threshold": 2.5}


def test_serve(called, tmp_path):
    from vgen.engines.server import command

    call = called(command)
    assert main(["serve", "m"]) == 7
    assert call.args == ("m",)
    assert call.kwargs == {
        "as_json": False, "quiet": False, "startup_timeout": 600.0, "arguments": [], "host": "127.0.0.1", "port": 8000,
        "api_key": None, "control_key": None, "tensor_parallel_size": 1, "data_parallel_size": 1,
        "otlp_traces_endpoint": None, "shared_memory_directory": None,
    }  # fmt: skip
    (tmp_path / "key").write_text("secret\n")
    given = ["--port", "0", "--api-key", "a", "--control-key-file", str(tmp_path / "key"), "-tp", "2"]
    main(["serve", "m", *given, "--max-model-len", "512", "--enforce-eager", "--shared-memory-dir", "d"])
    assert (call.kwargs["port"], call.kwargs["tensor_parallel_size"]) == (0, 2)
    assert (call.kwargs["api_key"], call.kwargs["control_key"]) == ("a", "secret")
    assert call.kwargs["shared_memory_directory"] == "d"
    assert call.kwargs["arguments"] == ["--max-model-len", "512", "--enforce-eager"]


def test_a_key_file_that_cannot_be_read_is_named(tmp_path, capsys):
    assert main(["serve", "m", "--api-key-file", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"vgen serve: cannot read {tmp_path / 'none'}: No such file or directory\n"


def test_dashboards(called):
    from vgen.dashboards import files, wandb

    write, save = called(files, "write"), called(wandb, "save")
    assert main(["dashboards", "d", "--wandb", "e/p"]) == 7
    assert (write.args, save.args) == ((Path("d"),), ())  # nothing more after a command that failed
    assert main(["dashboards", "--wandb", "e/p"]) == 7
    assert save.args == ("e/p",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["demo", "--steps", "0"], "must be at least 1, got 0"),
        (["demo", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["report", "r", "--threshold", "-1"], "must be a percentage of at least 0, got -1"),
        (["report", "r", "--threshold", "inf"], "must be a percentage of at least 0, got inf"),
        (["serve", "--max-model-len", "512", "m"], "MODEL comes before the options"),
        (["serve", "m", "--api-key", "a", "--api-key-file", "f"], "not allowed with argument --api-key"),
        (["dashboards"], "give DIR, --wandb ENTITY/PROJECT, or both"),
    ],
)
def test_a_wrong_command_line_is_status_2_and_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"vgen {vgen.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "trace", "report", "serve", "dashboards"])
def test_help_explains_every_option_but_vllms_own(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = capsys.readouterr().out.split("options:")[1].replace("\n" + " " * 24, "  ").splitlines()
    bare = [line for line in options if line.strip().startswith("-") and "  " not in line.strip()]
    assert all("parallel-size" in line or "endpoint" in line for line in bare), bare


def test_help_loads_the_standard_library_alone():
    code = "import sys; from vgen.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "vllm", "rich", "ddsketch", "aiohttp"} & set(loaded)


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    """`vgen trace RUN | head -1`: the command ends with status 0 and without a traceback."""
    code = "import sys; from vgen import demo; from vgen.cli import main\n"
    code += "def run(**_):\n    for _ in range(10_000): print('x' * 100)\n    return 0\n"
    code += "demo.run = run; sys.exit(main(['demo']))"
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
