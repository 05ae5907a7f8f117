"""The sdist, the wheel, and the installation of a fresh checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


# --- the distributions ---


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        licenses = [archive.read(name).decode() for name in names if name.endswith("/licenses/LICENSE")]
    assert "vgen/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"vgen", f"vgen-{PROJECT['version']}.dist-info"}
    in_tree = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/vgen").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == in_tree
    assert len(licenses) == 1
    assert "Apache License" in licenses[0]


def test_sdist_has_what_a_packager_needs_and_no_leftovers(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames()]
    wanted = "LICENSE Makefile README.md pyproject.toml requirements/constraints.txt scripts/install.sh"
    assert set(wanted.split()) <= set(names)
    assert f"tests/{Path(__file__).name}" in names
    tops = {name.split("/")[0] for name in names}
    assert not tops & {".git", ".gpu", ".venv", "build", "dist", "runs", "wandb"}
    assert not [name for name in names if "__pycache__" in name]
    if (ROOT / "docs").is_dir():
        assert "docs" in tops


def test_metadata_has_the_supported_pythons_and_extras(metadata: Message) -> None:
    assert metadata["Name"] == "vgen"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split("<")[0] for line in core) == ["ddsketch", "rich"]
    promised = (
        "vllm cpu server dashboards otel otlp wandb mlflow trackio nvtx "
        "trl peft deepspeed bitsandbytes router fuzz test lint dev"
    )
    assert set(metadata.get_all("Provides-Extra", [])) == set(promised.split())


def test_every_extra_but_the_engines_is_in_dev(metadata: Message) -> None:
    lines = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" in line]
    requires = [(line.split("extra == ")[0].removesuffix(" and "), line.split("extra == ")[1]) for line in lines]
    dev = {requirement for requirement, extra in requires if extra == "'dev'"}
    rest = {requirement for requirement, extra in requires if extra not in ("'cpu'", "'dev'", "'vllm'")}
    assert dev == rest


def test_version_is_one(wheel: Path, metadata: Message) -> None:
    import vgen

    assert metadata["Version"] == PROJECT["version"] == vgen.__version__


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_sdist_works_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", sdist)
    run(python, "-m", "pip", "check")
    code = "import vgen; from vgen import ProfilingContext; print(vgen.__version__, vgen.__file__)"
    version, where = run(python, "-I", "-c", code).stdout.split()
    assert version == PROJECT["version"]
    assert Path(where).is_relative_to(tmp_path)
    assert Path(where).with_name("py.typed").is_file()
    assert "demo" in run(tmp_path / "venv/bin/vgen", "--help").stdout


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_wheel_works_in_an_empty_environment(wheel: Path, metadata: Message, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"

    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    foreign = "sorted({m.split('.')[0] for m in sys.modules} - before - sys.stdlib_module_names - {'vgen'})"
    code = f"import sys; before = set(sys.modules); import vgen; print(vgen.__file__, {foreign})"
    bare = run(python, "-I", "-c", code).stdout.split()
    assert Path(bare[0]).is_relative_to(tmp_path)
    assert bare[1] == "[]"

    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    run(python, "-m", "pip", "install", "--quiet", *core)
    run(python, "-m", "pip", "check")
    run(python, "-I", "-c", "from vgen import ProfilingContext, Sampling")
    assert "demo" in run(tmp_path / "venv/bin/vgen", "--help").stdout


# --- scripts/install.sh ---
# The real script, with an interpreter that only records its arguments.

RECORDER = """#!/bin/sh
echo "UV_INDEX=$UV_INDEX UV_FIND_LINKS=$UV_FIND_LINKS $*" >>"$CALLS"
case "$*" in
  *"config list"*) [ -z "$PIP_FROM" ] || exec "$PIP_FROM" -m pip config list ;;
  *--dry-run*) exit "${PROBE:-0}" ;;
  *--editable*) exit "${INSTALL:-0}" ;;
esac
"""


class Checkout:
    """A copy of the files that the script reads, with a machine that the test describes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("scripts", "requirements"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.executable(".venv/bin/python", RECORDER)
        self.gpu(False)
        self.env = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "CALLS": str(folder / "calls"),
            "PIP_CONFIG_FILE": os.devnull,
        }

    def executable(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def gpu(self, there: bool) -> None:
        says = "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'" if there else "echo 'No devices were found'; exit 6"
        self.executable("bin/nvidia-smi", f"#!/bin/sh\n{says}\n")

    def try_install(self, level: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / "scripts/install.sh"), level]
        return subprocess.run(command, env=self.env | env, capture_output=True, text=True, timeout=60)

    def install(self, level: str, **env: str) -> list[str]:
        """The calls of the interpreter, one line each."""
        calls = self.folder / "calls"
        calls.write_text("")
        done = self.try_install(level, **env)
        assert done.returncode == 0, done.stderr
        return calls.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def asked(calls: list[str]) -> str:
    (line,) = (line for line in calls if "--editable" in line)
    return line


def test_second_install_does_nothing(checkout: Checkout) -> None:
    assert checkout.install("demo")
    assert checkout.install("demo") == []


def test_install_covers_the_levels_below_it(checkout: Checkout) -> None:
    checkout.install("lint")
    assert [checkout.install(level) for level in ("lint", "test", "demo", "build")] == [[], [], [], []]


def test_install_does_not_cover_the_levels_above_it(checkout: Checkout) -> None:
    checkout.install("demo")
    assert "pyright" not in asked(checkout.install("test"))
    assert asked(checkout.install("lint"))


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements/constraints.txt", "requirements/overrides.txt"])
def test_changed_requirements_are_installed(checkout: Checkout, name: str) -> None:
    checkout.install("demo")
    with (checkout.folder / name).open("a") as file:
        file.write("# changed\n")
    assert checkout.install("demo")


def test_failed_install_is_tried_again(checkout: Checkout) -> None:
    assert checkout.try_install("demo", INSTALL="1").returncode != 0
    assert asked(checkout.install("demo"))


def test_cpu_machine_gets_the_cpu_engine(checkout: Checkout) -> None:
    call = asked(checkout.install("demo"))
    assert ".[cpu,otel]" in call
    assert "--overrides requirements/overrides.txt" in call


def test_gpu_machine_gets_the_cuda_engine_without_overrides(checkout: Checkout) -> None:
    checkout.gpu(True)
    call = asked(checkout.install("demo"))
    assert ".[vllm,otel]" in call
    assert "--overrides" not in call


def test_environment_with_the_other_engine_is_made_again(checkout: Checkout) -> None:
    checkout.install("demo")
    checkout.gpu(True)
    remake = checkout.executable("bin/fake-python", '#!/bin/sh\n[ "$2" = venv ] && echo remade; exit 0\n')
    done = checkout.try_install("demo", PYTHON=str(remake))
    assert "remade" in done.stdout


@pytest.mark.parametrize("level", ["demo", "test", "lint"])
def test_levels_name_extras_that_exist(checkout: Checkout, level: str) -> None:
    extras = asked(checkout.install(level)).split(".[")[1].rstrip("]").split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_pytorch_index_is_used_only_if_no_other_source_has_torch(checkout: Checkout) -> None:
    assert "UV_INDEX= " in asked(checkout.install("demo"))
    assert "UV_INDEX=https://download.pytorch.org/whl/cpu " in asked(checkout.install("test", PROBE="1"))


def test_pip_settings_reach_uv(checkout: Checkout) -> None:
    config = checkout.folder / "pip.conf"
    config.write_text("[global]\nfind-links =\n    /a\n    /b\n")
    checkout.env["PIP_FROM"] = sys.executable  # other tests skip this call, because pip takes a while
    assert "UV_FIND_LINKS=/a,/b " in asked(checkout.install("demo", PIP_CONFIG_FILE=str(config)))
    assert "UV_FIND_LINKS=/c,/d " in asked(
        checkout.install("test", PIP_CONFIG_FILE=str(config), PIP_FIND_LINKS="/c /d")
    )
    assert "UV_FIND_LINKS=/e " in asked(checkout.install("lint", PIP_FIND_LINKS="/c", UV_FIND_LINKS="/e"))


@pytest.fixture
def interpreter_with(tmp_path: Path) -> Callable[[str, str], dict[str, str]]:
    """Environment variables with which a new Python imports a module of the test before its own."""

    def settings(module: str, source: str) -> dict[str, str]:
        shutil.rmtree(tmp_path / ".venv")
        (tmp_path / "patched").mkdir()
        (tmp_path / "patched" / f"{module}.py").write_text(source)
        return {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "patched")}

    return settings


def test_old_python_is_refused_by_name(
    checkout: Checkout, interpreter_with: Callable[[str, str], dict[str, str]]
) -> None:
    done = checkout.try_install("demo", **interpreter_with("sitecustomize", "import sys; sys.version_info = (3, 10)"))
    assert done.returncode != 0
    assert "is Python 3.10, and vgen needs 3.11 or newer" in done.stderr
    assert not (checkout.folder / ".venv").exists()


def test_missing_venv_package_is_named(
    checkout: Checkout, interpreter_with: Callable[[str, str], dict[str, str]]
) -> None:
    done = checkout.try_install("demo", **interpreter_with("ensurepip", "raise ImportError"))
    assert done.returncode != 0
    assert f"python{sys.version_info.major}.{sys.version_info.minor}-venv" in done.stderr
    assert not (checkout.folder / ".venv").exists()


# --- scripts/audit.py ---


def audit_found(*packages: dict[str, Any]) -> dict[str, Any]:
    return {"dependencies": [{"name": "a", "version": "1", "vulns": []}, *packages]}


VULNERABLE = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-9"], "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found on PyPI"}


@pytest.fixture
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts/audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("reachable", "found", "accepted", "status", "says"),
    [
        (True, audit_found(), {}, 0, "1 packages have no known vulnerability"),
        (True, audit_found(VULNERABLE, UNKNOWN), {}, 1, "b 2: PYSEC-1, mended by 3"),
        (True, audit_found(VULNERABLE), {"CVE-9": "why"}, 0, "2 packages have no known vulnerability"),
        (True, audit_found(), {"CVE-9": "why"}, 0, "CVE-9 concerns nothing that is installed"),
        (True, {"dependencies": [UNKNOWN]}, {}, 0, "nothing was audited"),
        (True, None, {}, 0, "nothing was audited"),
        (False, audit_found(VULNERABLE), {}, 0, "nothing was audited"),
    ],
)
def test_known_vulnerabilities_fail_the_check_where_they_are_to_be_had(
    audit, monkeypatch, capsys, reachable, found, accepted, status, says
):
    monkeypatch.setattr(audit, "reachable", lambda: reachable)
    monkeypatch.setattr(audit, "report", lambda: found)
    monkeypatch.setattr(audit, "ACCEPTED", accepted)
    assert audit.main() == status
    assert says in capsys.readouterr().out


def test_an_audit_that_takes_too_long_is_ended(audit, monkeypatch):
    monkeypatch.setattr(audit, "SECONDS", 0.01)
    assert audit.report() is None
