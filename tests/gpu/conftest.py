"""Each test begins on the first GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _first_gpu() -> None:
    import torch

    torch.cuda.set_device(0)
