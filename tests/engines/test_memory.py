"""What sleeping gives back, made of readings before and after, of one process or of many servers' workers."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from vgen import ServerConnection, ServerGeneration, WeightSyncError
from vgen.engines.memory import MemoryReading, WorkerMemory, sleep_report, sum_of_workers, wake_report
from vgen.errors import error_from_dict
from vgen.testing import FaultyServer

torch = pytest.importorskip("torch")

from helpers.loader_kinds import DefaultCopies  # noqa: E402  it needs torch

from vgen.weights.transports.buckets import FORMS, TIES, forms_of  # noqa: E402

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")

AWAKE = MemoryReading(10, 70, 100, awake={"weights": 20, "kv_cache": 30})
ASLEEP = MemoryReading(58, 22, 121, asleep={"weights": 20, "kv_cache": 30})
HALF = MemoryReading(39, 41, 101, awake={"weights": 20}, asleep={"kv_cache": 30})


class Model(torch.nn.Module):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))


def test_a_sleep_is_expected_to_give_back_what_was_awake():
    report = sleep_report(AWAKE, ASLEEP)
    assert (report.memory_freed, report.device_bytes, report.host_bytes) == (True, 48, 21)
    assert report.expected == {"weights": 20, "kv_cache": 30}
    assert report.device_in_use == 22
    assert sleep_report(AWAKE, AWAKE).memory_freed is False


def test_waking_is_told_by_tag_where_each_was_read():
    whole = wake_report([ASLEEP, HALF, AWAKE], ["weights", "kv_cache"])
    assert (whole.device_bytes, whole.host_bytes) == (48, 21)
    assert whole.expected == {"weights": 20, "kv_cache": 30}
    assert whole.taken == {"weights": 19, "kv_cache": 29}
    assert wake_report([ASLEEP, AWAKE], ["weights", "kv_cache"]).taken == {}
    part = wake_report([ASLEEP, HALF], ["weights"])
    assert (part.expected, part.taken) == ({"weights": 20}, {"weights": 19})


def test_workers_are_added_up_and_one_without_a_device_is_none_at_all():
    assert sum_of_workers([asdict(AWAKE), asdict(HALF)]) == MemoryReading(
        49, 111, 201, awake={"weights": 40, "kv_cache": 30}, asleep={"kv_cache": 30}
    )
    assert sum_of_workers([asdict(AWAKE), {}]) is None


def answers(reading):
    return lambda body: {"results": [asdict(reading)] * 2} if body == {"method": "vgen_memory"} else {}


def test_servers_are_asked_before_and_after():
    with FaultyServer(features=["batch", "lease", "memory"]) as server:
        server.answers["/vgen/info"]["device"] = "cuda"
        server.faults["/collective_rpc"] = [answers(each) for each in (AWAKE, ASLEEP, ASLEEP, HALF, HALF, AWAKE)]
        with ServerGeneration(Model(), base_urls=[server.url], connection=ServerConnection(timeout=20.0)) as generation:
            report = generation.sleep(1)
            assert (report.device_bytes, report.host_bytes, report.device_in_use) == (96, 42, 44)
            assert report.expected == {"weights": 40, "kv_cache": 60}
            assert generation.wake_up(["weights"]).taken == {"weights": 38}
            assert generation.wake_up(["kv_cache"]).taken == {"kv_cache": 58}


def test_a_server_that_does_not_tell_is_not_asked():
    with FaultyServer(features=["batch", "lease"]) as server:
        server.answers["/vgen/info"]["device"] = "cuda"
        with ServerGeneration(Model(), base_urls=[server.url], connection=ServerConnection(timeout=20.0)) as generation:
            report = generation.sleep(1)
    assert (report.memory_freed, report.device_bytes) == (True, None)
    assert "/collective_rpc" not in [path for path, _, _ in server.seen]


class Worker(WorkerMemory):
    """A server's worker with a model of one projection."""

    def __init__(self) -> None:
        self.model = DefaultCopies()
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)


def audit_of_worker(ties=None, **changed):
    forms = forms_of(DefaultCopies.sent(**changed), ties or {})
    forms = json.loads(json.dumps(forms))  # as HTTP brings it
    return Worker().vgen_audit(forms[FORMS], forms[TIES])


def test_a_worker_audits_what_it_is_told_of_and_answers_in_json():
    answer = audit_of_worker(norm=((8,), torch.float64))
    assert json.loads(json.dumps(answer)) == {"unaudited": "", "narrowed": ["norm"]}
    assert audit_of_worker(ties={"down_bias": "norm"}, down_bias=(8,)) == {"unaudited": "", "narrowed": []}


def test_a_worker_answers_with_the_error_that_a_lost_bias_is():
    error = error_from_dict(json.loads(json.dumps(audit_of_worker(down_bias=(8,))))["error"])
    assert isinstance(error, WeightSyncError)
    assert (error.phase, error.parameter, error.receiver) == ("load", "down_bias", "server")
    assert "no place for it (shape [8]" in str(error)
    error = error_from_dict(Worker().vgen_audit([["down", "no_dtype", [8, 16]]], {})["error"])
    assert error.parameter == "down"
