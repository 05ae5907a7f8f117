"""What these tests take from those of the profiling: a real Prometheus, and offline W&B runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "profiling"))
