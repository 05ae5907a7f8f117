"""The `vgen` command as a user runs it, for the tests of the demo."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {**os.environ, "PYTHONHASHSEED": "0"}
# With random.seed(0), ids drawn from `random` would be the same in every run and rank.
CODE = "import random, sys; random.seed(0); from vgen.cli import main; sys.exit(main(sys.argv[1:]))"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", CODE, *arguments]


@dataclass
class Started:
    """A demo of two steps that runs while other tests run: half of its time is for imports."""

    folder: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def in_folder(cls, folder: Path) -> Started:
        arguments = command("demo", "--steps", "2", "--out", str(folder / "run"), "--json")
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            return cls(folder, subprocess.Popen(arguments, stdout=stdout, stderr=stderr, env=ENVIRONMENT))

    def done(self) -> subprocess.CompletedProcess[str]:
        status = self.process.wait(240)
        stdout, stderr = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.process.args, status, stdout, stderr)
