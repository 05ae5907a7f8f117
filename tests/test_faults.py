"""docs/faults.md is what the tests' markers say, and the faults are many and spread."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import faults  # noqa: E402

ALL = faults.faults()
HANGS = """
import threading, pytest

@pytest.mark.fault(point="a point", did="It hangs", happens="It is ended", within=0.2)
def test_hangs():
    threading.Event().wait(60)
"""


def test_the_page_is_what_the_markers_say():
    assert faults.PAGE.read_text(encoding="utf-8") == faults.page(), "run `python scripts/faults.py`"


def test_there_are_many_faults_and_few_at_each_point():
    assert len(ALL) >= 150
    assert len({(fault.point, fault.did, fault.happens) for fault in ALL}) == len(ALL)
    most = Counter(fault.point for fault in ALL).most_common(1)
    assert most[0][1] <= 5, most


def test_each_row_has_words_and_a_deadline():
    for fault in ALL:
        assert fault.point, fault
        assert fault.did, fault
        assert fault.happens, fault
        assert 0 < fault.within <= 300, fault


def test_a_test_with_a_fault_may_take_no_longer_than_its_row_says(request):
    marked = [item for item in request.session.items if item.get_closest_marker("fault")]
    for item in marked:
        seconds = max(marker.kwargs["within"] for marker in item.iter_markers("fault"))
        assert item.get_closest_marker("timeout").args == (seconds,), item.nodeid


def test_the_deadline_ends_a_test_that_hangs(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = fault: a row\n")
    (tmp_path / "test_hangs.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "1 failed" in done.stdout
    assert "Timeout" in done.stdout
    assert "0.2" in done.stdout
