"""The audit log by plain ASGI calls: one line for each change, and no secret in it."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")

from vgen.engines.server import audit_log


@pytest.fixture
def audit(caplog):
    caplog.set_level(logging.INFO, "vgen.audit")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "vgen.audit"]


async def test_the_audit_log_names_who_has_the_lease(call, audit):
    peer = {"client": ("10.0.0.5", 4711)}
    await call("POST", "/vgen/lease", {"holder": "first\nline"}, **peer)
    await call("POST", "/vgen/lease", {"holder": "second"}, **peer)  # refused
    await call("POST", "/vgen/lease", {"holder": "second", "takeover": True, "ttl_seconds": 1}, **peer)
    call.clock.now += 2
    _, answer = await call("POST", "/vgen/lease", {"holder": "second", "ttl_seconds": 1}, **peer)
    call.clock.now += 2
    mine = await call.lease("third")
    await call("POST", "/vgen/lease/renew", headers=mine)
    await call("POST", "/vgen/lease/release", headers=mine)
    where = 'client="10.0.0.5:4711"'
    assert audit() == [
        f'take_lease holder="first\\nline" epoch=1 {where}',
        f'take_over_lease holder="second" epoch=2 before="first\\nline" {where}',
        f'retake_lease holder="second" epoch=3 before="second" {where}',
        'take_lease holder="third" epoch=4 before="second" client="unknown:0"',
        'release_lease holder="third" client="unknown:0"',
    ]
    assert answer["token"] not in str(audit())


async def test_the_audit_log_names_who_changed_what(call, audit):
    mine = await call.lease("me")
    for path, body, query in (
        ("/vgen/pause", None, b"mode=keep&key=secret"),
        ("/start_weight_update", {}, b""),
        ("/update_weights", {"update_info": {}}, b""),
        ("/finish_weight_update", {"weight_version": "step-1"}, b""),
        ("/vgen/weights", {"weight_version": "step-2", "update_info": {"secret": 1}}, b""),
        ("/update_weight_version", {"new_version": "step-3"}, b""),
        ("/resume", None, b""),
        ("/sleep", None, b"level=2"),
        ("/wake_up", None, b"tags=weights&tags=kv_cache"),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/secret"}, b""),
        ("/reset_prefix_cache", None, b""),
    ):
        assert (await call("POST", path, body, headers=mine, query_string=query))[0] == 200
    call.app.answers |= {"/update_weights": 500, "/pause": RuntimeError("breaks")}
    await call("POST", "/update_weights", b"{", headers=mine)
    with pytest.raises(RuntimeError, match="breaks"):
        await call("POST", "/pause", headers=mine)
    await call("POST", "/vgen/lease/release", headers=mine)
    await call("POST", "/sleep")
    assert audit() == [
        'take_lease holder="me" epoch=1 client="unknown:0"',
        'pause status=200 holder="me" mode="keep" client="unknown:0"',
        'sync status=200 holder="me" version="step-1" client="unknown:0"',
        'sync status=200 holder="me" version="step-2" client="unknown:0"',
        'set_weight_version status=200 holder="me" version="step-3" client="unknown:0"',
        'resume status=200 holder="me" client="unknown:0"',
        'sleep status=200 holder="me" level="2" client="unknown:0"',
        'wake_up status=200 holder="me" tags="weights,kv_cache" client="unknown:0"',
        'load_adapter status=200 holder="me" adapter="a" client="unknown:0"',
        'sync status=500 holder="me" client="unknown:0"',
        'pause status=500 holder="me" client="unknown:0"',
        'release_lease holder="me" client="unknown:0"',
        'sleep status=200 client="unknown:0"',
    ]


async def test_what_was_refused_is_no_change(call, audit):
    await call.lease("me")
    assert (await call("POST", "/pause"))[0] == 409
    assert (await call("POST", "/pause", headers={}))[0] == 401
    assert len(audit()) == 1


@pytest.fixture
def unconfigured(monkeypatch):
    """The logger as in a server whose logging is vLLM's default: nothing handles it."""
    logger = logging.Logger("vgen.audit")
    monkeypatch.setattr(audit_log, "logger", logger)
    return logger


async def test_without_a_configuration_it_goes_to_standard_error_once(call, unconfigured, capsys):
    audit_log.show()
    audit_log.show()
    assert unconfigured.level == logging.INFO
    await call.lease("me")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith('vgen.audit take_lease holder="me" epoch=1 client="unknown:0"')


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage().partition(" ")[0])


@pytest.mark.parametrize(("level", "seen"), [(logging.NOTSET, ["take_lease"]), (logging.WARNING, [])])
async def test_a_configuration_of_the_users_stays(call, unconfigured, capsys, level, seen):
    records = Records()
    unconfigured.addHandler(records)
    unconfigured.setLevel(level)
    audit_log.show()
    await call.lease("me")
    assert (records.seen, capsys.readouterr().err) == (seen, "")
