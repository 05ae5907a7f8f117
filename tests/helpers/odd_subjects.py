"""Subjects of a check for the command line, which imports them by name: one that is right, and some that misbehave."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from helpers.copied_model import CopiedModel


class Right(CopiedModel):
    pass


class Stale(CopiedModel):
    def sync(self, model):
        pass


class Raises(CopiedModel):
    def generate(self, prompts, **options):
        raise OSError("no engine\nat all")


class Hangs(CopiedModel):
    def sync(self, model):
        print("printed by the adapter")
        threading.Event().wait()


class Short(CopiedModel):
    def generate(self, prompts, **options):
        return []
