"""Stores of keys and values that a weight sync can have emptied, and those that it cannot."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from vgen.engines.kv_stores import refusal


def transfer(name, **extra):
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def children(*connectors):
    return transfer("MultiConnector", connectors=list(connectors))


EMPTIED = [
    None,
    {"kv_connector": None},
    transfer("OffloadingConnector", cpu_bytes_to_use=1 << 30),
    transfer("OffloadingConnector", spec_name="TieringOffloadingSpec", secondary_tiers=[]),
    transfer("SimpleCPUOffloadConnector"),
    transfer("MooncakeStoreConnector"),
    transfer("ExampleHiddenStatesConnector"),
    children(transfer("OffloadingConnector"), transfer("SimpleCPUOffloadConnector")),
]
KEPT = [
    (transfer("ExampleConnector", shared_storage_path="/tmp/kv"), "ExampleConnector of kv_transfer_config does not"),
    (transfer("LMCacheConnectorV1"), "LMCacheConnectorV1 of"),
    (transfer("NixlConnector"), "NixlConnector of"),
    (transfer("OffloadingConnector") | {"kv_connector_module_path": "my.connectors"}, "OffloadingConnector of"),
    (transfer("OffloadingConnector", spec_name="MySpec", spec_module_path="my.specs"), "the MySpec of"),
    (transfer("OffloadingConnector", spec_name="TieringOffloadingSpec", secondary_tiers=[{"type": "fs"}]), r"\(fs\)"),
    (children(transfer("OffloadingConnector"), transfer("ExampleConnector")), "ExampleConnector of"),
]


def as_objects(value):
    """Configuration as vLLM has it in its process: attributes instead of keys, down to the connector's own options."""
    return SimpleNamespace(kv_transfer_config=value and SimpleNamespace(**value), ec_transfer_config=None)


@pytest.mark.parametrize("connector", EMPTIED)
def test_a_store_that_confirms_that_it_is_empty_is_accepted(connector):
    assert refusal({"kv_transfer_config": connector}) is None
    assert refusal(as_objects(connector)) is None


@pytest.mark.parametrize(("connector", "named"), KEPT)
def test_any_other_store_is_refused_by_its_name(connector, named):
    why = refusal({"kv_transfer_config": connector})
    assert re.search(named + r".*, so after a weight sync .*: start it without that, or", str(why))
    assert refusal(as_objects(connector)) == why


def test_offloading_is_to_host_memory_by_vllm_itself():
    assert refusal({}) is None
    assert refusal(None) is None
    assert refusal({"kv_offloading_size": 4.0}) is None
    assert refusal({"kv_offloading_backend": "lmcache"}) is None  # without a size vLLM does not offload
    assert "use kv_offloading_backend='native'" in str(
        refusal({"kv_offloading_size": 4.0, "kv_offloading_backend": "lmcache"})
    )


def test_encoder_outputs_cannot_be_discarded():
    config = {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}}
    assert "ECExampleConnector of ec_transfer_config keeps encoder outputs" in str(refusal(config))
