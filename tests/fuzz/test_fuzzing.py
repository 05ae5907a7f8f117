"""Whatever comes from a stranger or a peer ends in an answer or a typed error: a fuzzer tries for a minute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import fuzzing

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")
pytest.importorskip("PIL", reason="Pillow is not installed")

SECONDS = int(os.environ.get("VGEN_FUZZ_SECONDS", "60"))
"""For each target; `make fuzz` asks for half an hour."""
LIGHT = sorted(set(fuzzing.TARGETS) - {"batch_route"})
"""Targets that need no vLLM."""


def fuzzed(target: str, seconds: int, folder: Path, *prelude: str) -> subprocess.CompletedProcess[str]:
    """Fuzz in a process of its own, which ends at the first input that breaks a rule."""
    start = "; ".join([*prelude, "from helpers import fuzzing", "import sys, pathlib"])
    code = f"{start}; sys.argv[1:] = []; fuzzing.fuzz({target!r}, {seconds}, pathlib.Path({str(folder)!r}))"
    path = os.pathsep.join([str(Path(fuzzing.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    limit = seconds + 120 + fuzzing.HANG_SECONDS
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=limit
    )


@pytest.mark.parametrize("target", LIGHT)
def test_what_is_right_and_what_was_once_wrong_breaks_no_rule(target):
    for data in fuzzing.first_inputs(target):
        fuzzing.TARGETS[target](data)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_no_input_breaks_a_rule(tmp_path, target):
    pytest.importorskip("atheris", reason="atheris is not installed: it is for Linux on x86-64")
    if target not in LIGHT:
        pytest.importorskip("vllm", reason="vLLM is not installed")
    done = fuzzed(target, SECONDS, tmp_path)
    culprits = {path.name: path.read_bytes() for path in tmp_path.glob(f"{target}-*")}
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{culprits}"
    (runs,) = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("Done ")]
    print(f"{target}: {runs} inputs")
    assert int(runs) > len(fuzzing.first_inputs(target))


@pytest.mark.slow
def test_the_fuzzer_finds_a_rule_that_is_broken(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed: it is for Linux on x86-64")
    half_a_number = "lambda raw: [*__import__('struct').unpack(f'<{len(raw) // 4}i', raw)]"
    broken = ("import vgen.completion_codec as codec", f"codec.to_ints = {half_a_number}")
    done = fuzzed("rank_messages", 150, tmp_path, *broken)  # a few seconds, mostly
    assert done.returncode != 0
    assert "unpack requires a buffer" in done.stdout + done.stderr
    assert list(tmp_path.glob("rank_messages-*"))
