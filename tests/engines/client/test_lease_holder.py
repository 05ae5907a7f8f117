"""The client's side of the lease."""

from __future__ import annotations

import pytest
from helpers.server_generation import BATCH, calls, generation

from vgen import (
    EngineError,
)


def test_the_lease_is_taken_carried_and_released(ours):
    with generation(ours, control_key="key") as made:
        made.generate([[1]])
        made.sleep()
    paths = {path.partition("?")[0]: headers for path, headers, _ in ours.seen}
    assert paths["/sleep"]["X-Vgen-Lease"] == "a-token"
    assert paths["/vgen/lease/release"]["X-Vgen-Lease"] == "a-token"
    assert "X-Vgen-Lease" not in paths[BATCH]  # inference needs none


def test_a_server_that_another_living_trainer_holds_is_not_taken(ours):
    ours.faults["/vgen/lease"] = [409] * 100
    with pytest.raises(EngineError, match="takeover=True"):
        generation(ours, timeout=0.75)
    ours.faults.clear()
    with generation(ours, takeover=True):
        assert calls(ours, "/vgen/lease")[-1]["takeover"] is True
