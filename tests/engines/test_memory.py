"""What sleeping gives back, made of readings before and after, of one process or of many servers' workers."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from vgen import ServerGeneration
from vgen.engines.memory import Reading, reading_of, slept, woken
from vgen.testing import FaultyServer

torch = pytest.importorskip("torch")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")

AWAKE = Reading(10, 70, 100, awake={"weights": 20, "kv_cache": 30})
ASLEEP = Reading(58, 22, 121, asleep={"weights": 20, "kv_cache": 30})
HALF = Reading(39, 41, 101, awake={"weights": 20}, asleep={"kv_cache": 30})


class Model(torch.nn.Module):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))


def test_a_sleep_is_expected_to_give_back_what_was_awake():
    report = slept(AWAKE, ASLEEP)
    assert (report.memory_freed, report.device_bytes, report.host_bytes) == (True, 48, 21)
    assert report.expected == {"weights": 20, "kv_cache": 30}
    assert report.device_in_use == 22
    assert slept(AWAKE, AWAKE).memory_freed is False


def test_waking_is_told_by_tag_where_each_was_read():
    whole = woken([ASLEEP, HALF, AWAKE], ["weights", "kv_cache"])
    assert (whole.device_bytes, whole.host_bytes) == (48, 21)
    assert whole.expected == {"weights": 20, "kv_cache": 30}
    assert whole.taken == {"weights": 19, "kv_cache": 29}
    assert woken([ASLEEP, AWAKE], ["weights", "kv_cache"]).taken == {}
    part = woken([ASLEEP, HALF], ["weights"])
    assert (part.expected, part.taken) == ({"weights": 20}, {"weights": 19})


def test_workers_are_added_up_and_one_without_a_device_is_none_at_all():
    assert reading_of([asdict(AWAKE), asdict(HALF)]) == Reading(
        49, 111, 201, awake={"weights": 40, "kv_cache": 30}, asleep={"kv_cache": 30}
    )
    assert reading_of([asdict(AWAKE), {}]) is None


def answers(reading):
    return lambda body: {"results": [asdict(reading)] * 2} if body == {"method": "vgen_memory"} else {}


def test_servers_are_asked_before_and_after():
    with FaultyServer(features=["batch", "lease", "memory"]) as server:
        server.answers["/vgen/info"]["device"] = "cuda"
        server.faults["/collective_rpc"] = [answers(each) for each in (AWAKE, ASLEEP, ASLEEP, HALF, HALF, AWAKE)]
        with ServerGeneration(Model(), base_urls=[server.url], timeout=20.0) as generation:
            report = generation.sleep(1)
            assert (report.device_bytes, report.host_bytes, report.device_in_use) == (96, 42, 44)
            assert report.expected == {"weights": 40, "kv_cache": 60}
            assert generation.wake_up(["weights"]).taken == {"weights": 38}
            assert generation.wake_up(["kv_cache"]).taken == {"kv_cache": 58}


def test_a_server_that_does_not_tell_is_not_asked():
    with FaultyServer(features=["batch", "lease"]) as server:
        server.answers["/vgen/info"]["device"] = "cuda"
        with ServerGeneration(Model(), base_urls=[server.url], timeout=20.0) as generation:
            report = generation.sleep(1)
    assert (report.memory_freed, report.device_bytes) == (True, None)
    assert "/collective_rpc" not in [path for path, _, _ in server.seen]
