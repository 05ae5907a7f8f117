"""The browser, where there is one, and the hand-made runs of the analysis's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium import Chromium, executable


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    if executable() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    pytest.importorskip("aiohttp", reason="Chromium is driven over aiohttp: pip install 'vgen[server]'")
    with Chromium() as chromium:
        yield chromium
