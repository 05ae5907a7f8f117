"""The committed files are what the command makes, and the command says what it could not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vgen.cli import main
from vgen.dashboards.files import files

COMMITTED = Path(__file__).parents[2] / "dashboards"


def test_the_committed_files_are_those_that_are_made():
    committed = {str(path.relative_to(COMMITTED)): path.read_text() for path in COMMITTED.rglob("*") if path.is_file()}
    assert committed == files(), "semconv.py or a panel has changed: vgen dashboards dashboards"


def test_the_command_writes_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["dashboards", str(tmp_path / "new" / "place")]) == 0
    assert {
        str(path.relative_to(tmp_path / "new" / "place")) for path in map(Path, capsys.readouterr().out.split())
    } == set(files())
    assert (tmp_path / "new/place/compose.yaml").read_text() == files()["compose.yaml"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    assert main(["dashboards", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("vgen dashboards: cannot write ")


def test_without_a_folder_it_says_what_it_takes(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["dashboards"])
    assert "DIR, --wandb ENTITY/PROJECT, or both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("grafana_foundation_sdk", ["out"]), ("yaml", ["out"]), ("wandb_workspaces", ["--wandb", "a/b"])],
)
def test_a_missing_package_is_named_with_what_installs_it(missing: str, arguments: list[str], tmp_path: Path):
    code = f"import sys; sys.modules[{missing!r}] = None; from vgen.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "dashboards", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install 'vgen[dashboards]'")
    assert not list(tmp_path.iterdir())
