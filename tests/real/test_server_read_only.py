"""A container with a read-only /tmp: a server and an engine in this process work with TMPDIR."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vgen.testing import tiny_model

READ_ONLY = """
for place in /tmp /var/tmp /usr/tmp; do
  [ -d $place ] || continue
  mount --bind $place $place && mount -o remount,ro,bind $place || exit 77
done
cd /proc
exec "$@"
"""
SERVE = """
import sys
from vgen.engines.server.launcher import start_server
arguments = ["--max-model-len", "256", "--dtype", "float32", "--kv-cache-memory-bytes", str(16 << 20)]
with start_server(sys.argv[1], arguments=arguments) as server:
    print("works:", server.control_key_file)
"""
IN_PROCESS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from vgen import ColocateGeneration, Sampling
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with ColocateGeneration(
    model,
    processing_class=AutoTokenizer.from_pretrained(sys.argv[1]),
    engine_kwargs={"kv_cache_memory_bytes": 16 << 20},
) as generation:
    print("works:", len(generation.generate([[1, 2]], Sampling(max_tokens=4, ignore_eos=True))[0].token_ids))
"""


@pytest.fixture
def elsewhere():
    """A folder that is not below /tmp."""
    folder = Path("/dev/shm", f"vgen-test-{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def run(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the code where /tmp is read-only, and where the current folder takes no files."""
    command = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", sys.executable, "-c", code, *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "TEMP", "TMP")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment | variables)
    if result.returncode == 77 or result.stderr.startswith("unshare:"):
        pytest.skip("this user may not mount file systems")
    return result


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
@pytest.mark.parametrize("code", [SERVE, IN_PROCESS], ids=["server", "in process"])
def test_with_tmpdir_set_it_works(elsewhere, code):
    tiny_model(elsewhere / "model")
    temporary = elsewhere / "temporary"
    temporary.mkdir()
    result = run(code, str(elsewhere / "model"), TMPDIR=str(temporary))
    assert "works:" in result.stdout, result.stderr[-3000:]
    assert [path.name for path in temporary.glob("vgen-serve-*")] == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_without_it_the_error_names_what_to_set(elsewhere):
    tiny_model(elsewhere / "model")
    result = run(
        "import sys; from vgen.cli import main; sys.exit(main(['serve', sys.argv[1]]))", str(elsewhere / "model")
    )
    assert result.returncode == 1
    assert "set TMPDIR to" in result.stderr
    assert "Traceback" not in result.stderr
