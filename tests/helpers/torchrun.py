"""Two real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def on_two_ranks(worker: str, arguments: list[str], folder: Path, **environment: str) -> list[dict]:
    """What each rank of `worker`, a file beside this one, has written into `folder`, which is its last argument."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name(worker)), *arguments, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-9000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
