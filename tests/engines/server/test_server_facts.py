"""What a server says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")


async def test_info_says_why_no_weights_may_be_synced(call):
    transfer = SimpleNamespace(kv_connector="LMCacheConnectorV1")
    call.app.state.vllm_config = SimpleNamespace(kv_transfer_config=transfer)
    assert "LMCacheConnectorV1" in (await call("GET", "/vgen/info"))[1]["kv_store_refusal"]
    transfer.kv_connector = "OffloadingConnector"
    assert (await call("GET", "/vgen/info"))[1]["kv_store_refusal"] is None
