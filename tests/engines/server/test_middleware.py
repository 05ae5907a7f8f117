"""The middleware by plain ASGI calls: who may do what, without a server."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")

from helpers.control_calls import HAS_KEY, KEY, App, Caller

from vgen.engines.server import middleware
from vgen.engines.server.middleware import KEY_FILE_VARIABLE, ControlMiddleware

CHANGES = [
    "/pause",
    "/vgen/pause",
    "/vgen/weights",
    "/resume",
    "/sleep",
    "/wake_up",
    "/update_weights",
    "/collective_rpc",
    "/reset_prefix_cache",
]
CHANGES += ["/abort_requests", "/v1/load_lora_adapter", "/anything/vllm/adds/next"]


@pytest.mark.parametrize("path", ["/health", "/metrics", "/metrics/", "/version", "/ping"])
async def test_these_are_read_without_a_key(call, path):
    assert (await call("GET", path, headers={}))[0] == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/inference/v1/generate", "/v2/embed"])
async def test_inference_is_left_to_vllms_own_key(call, path):
    assert (await call("POST", path, headers={}))[0] == 200


@pytest.mark.parametrize(
    "path", [*CHANGES, "/server_info", "/tokenize", "/docs", "/v1x", "/vgen/info", "", "//v1/models"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
@pytest.mark.fault(
    point="who may change a server",
    did="A caller without the control key calls a route that changes the server",
    happens="401, and nothing changes",
    within=20,
)
async def test_all_else_needs_the_control_key(call, path, method):
    for headers in (
        {},
        {"x-vgen-control-key": "wrong"},
        {"x-vgen-control-key": ""},
        {"authorization": f"Bearer {KEY}"},
    ):
        status, answer = await call(method, path, headers=headers)
        assert status == 401
        assert answer["error"]["type"] == "vgen_control_key"
        assert "X-Vgen-Control-Key" in answer["error"]["message"]
        assert KEY not in str(answer)
    assert call.app.reached == []


@pytest.mark.parametrize("path", ["/health", "/metrics"])
async def test_what_may_be_read_may_not_be_written(call, path):
    assert (await call("POST", path, headers={}))[0] == 401


@pytest.mark.parametrize(
    ("root", "path", "status"),
    [
        ("/v1", "/v1/pause", 401),
        ("/proxy", "/proxy/pause", 401),
        ("/proxy", "/proxy/v1/models", 200),
        ("/v", "/v1/pause", 200),
    ],
)
async def test_a_proxys_prefix_is_taken_off_as_the_router_does(call, root, path, status):
    assert (await call("POST", path, headers={}, root_path=root))[0] == status


async def test_a_websocket_needs_the_key_outside_inference(call):
    async def connect(path: str) -> list[Any]:
        sent: list[Any] = []

        async def send(message) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": path, "headers": []}
        await call.middleware(scope, None, send)
        return sent

    assert (await connect("/control"))[0]["type"] == "websocket.close"
    assert call.app.reached == []
    await connect("/v1/realtime")
    assert call.app.reached == ["/v1/realtime"]


async def test_the_servers_own_start_passes(call):
    await call.middleware({"type": "lifespan"}, None, None)
    assert call.app.reached == ["lifespan"]


async def test_vgens_routes_are_added_once(call):
    pytest.importorskip("starlette", reason="starlette is not installed")
    from starlette.applications import Starlette

    app = Starlette()
    for _ in range(2):
        await call.middleware({"type": "lifespan", "app": app}, None, None)
    assert [route.path for route in app.routes] == ["/inference/vgen/generate", "/vgen/pause", "/vgen/weights"]


def test_without_a_key_it_does_not_start(monkeypatch, tmp_path):
    monkeypatch.delenv(KEY_FILE_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match=KEY_FILE_VARIABLE):
        ControlMiddleware(App())
    (tmp_path / "key").write_text("\n")
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "key"))
    with pytest.raises(RuntimeError, match=KEY_FILE_VARIABLE):
        ControlMiddleware(App())


# The lease


@pytest.mark.parametrize("path", CHANGES)
async def test_whoever_has_the_key_may_act_until_somebody_takes_the_lease(call, path):
    assert (await call("POST", path))[0] == 200
    mine = await call.lease()
    status, answer = await call("POST", path)
    assert (status, answer["error"]["type"], answer["error"]["lease"]["holder"]) == (409, "vgen_lease", "me")
    assert (await call("POST", path, headers=mine))[0] == 200
    assert (await call("POST", "/vgen/lease/release", headers=mine))[0] == 200
    assert (await call("POST", path))[0] == 200
    assert (await call("POST", path, headers=mine))[0] == 409  # a token of the past, though nobody holds it now


async def test_reading_and_inference_need_no_lease(call):
    await call.lease()
    for method, path in (
        ("GET", "/is_paused"),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("GET", "/vgen/info"),
    ):
        assert (await call(method, path))[0] == 200


async def test_a_lease_is_refused_while_held_and_taken_over_at_once(call):
    first = await call.lease("first")
    status, answer = await call("POST", "/vgen/lease", {"holder": "second"})
    assert status == 409
    assert answer["error"]["lease"] == {"holder": "first", "epoch": 1, "held_seconds": 0.0, "expires_in_seconds": 60.0}
    second = await call.lease("second", takeover=True)
    assert (await call("POST", "/pause", headers=first))[0] == 409
    assert (await call("POST", "/vgen/lease/renew", headers=first))[0] == 409
    assert (await call("POST", "/vgen/lease/release", headers=first))[0] == 409
    assert (await call("POST", "/vgen/lease/renew", headers=second)) == (200, {"epoch": 2, "ttl_seconds": 60.0})


async def test_a_lease_expires_when_it_is_not_used_and_each_use_renews_it(call):
    first = await call.lease(ttl_seconds=10)
    for _ in range(3):
        call.clock.now += 9
        assert (await call("POST", "/pause", headers=first))[0] == 200
    call.clock.now += 10
    status, answer = await call("POST", "/pause", headers=first)
    assert (status, answer["error"]["lease"]) == (409, None)
    assert "expired" in answer["error"]["message"]
    await call.lease("second")


async def test_a_lease_does_not_expire_under_a_call_that_takes_long(call):
    first = await call.lease(ttl_seconds=10)

    async def long() -> None:
        call.clock.now += 1000
        assert (await call("POST", "/vgen/lease", {"holder": "second"}))[0] == 409

    call.app.answers["/update_weights"] = long
    assert (await call("POST", "/update_weights", headers=first))[0] == 200
    assert (await call("POST", "/pause", headers=first))[0] == 200


class HalfBody:
    """A request for a change whose body comes in pieces, when the test says so."""

    def __init__(self, call: Caller, headers: dict[str, str], path: str = "/update_weights") -> None:
        self.sent: list[Any] = []
        self._pieces = asyncio.Queue[dict[str, Any]]()
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": pairs, "app": call.app}
        self.task = asyncio.create_task(call.middleware(scope, self._pieces.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def receive(self, piece: bytes | None, *, more: bool = False) -> None:
        """The client sends a piece of the body; None: it hangs up."""
        ended = {"type": "http.disconnect"}
        await self._pieces.put(ended if piece is None else {"type": "http.request", "body": piece, "more_body": more})
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.mark.fault(
    point="a call's body on the server",
    did="A body is sent half and never finished",
    happens="It holds no lease",
    within=20,
)
async def test_a_body_that_never_arrives_whole_holds_no_lease(call):
    first = await call.lease(ttl_seconds=1)
    half = HalfBody(call, first)
    await half.receive(b"{", more=True)
    call.clock.now += 2
    second = await call.lease("second")
    await half.receive(b"}")
    await half.task
    assert half.sent[0]["status"] == 409  # it is no longer the holder, now that its body is here
    assert call.app.reached == []
    assert (await call("POST", "/update_weights", headers=second))[0] == 200


@pytest.mark.fault(
    point="a call's body on the server",
    did="A client hangs up in the middle of its body",
    happens="Nothing reaches the engine",
    within=20,
)
async def test_a_client_that_hangs_up_in_its_body_changes_nothing(call):
    half = HalfBody(call, await call.lease())
    await half.receive(b"{", more=True)
    await half.receive(None)
    await half.task
    assert (call.app.reached, half.sent) == ([], [])


async def test_a_body_in_pieces_reaches_the_application_whole_and_only_then(call):
    bodies: list[Any] = []

    async def app(scope, receive, send) -> None:
        bodies.extend([await receive(), await receive()])
        await App()(scope, receive, send)

    call.middleware.app = app
    half = HalfBody(call, await call.lease())
    await half.receive(b'{"a"', more=True)
    assert bodies == []
    await half.receive(b": 1}")
    await half.receive(None)
    await half.task
    assert bodies == [{"type": "http.request", "body": b'{"a": 1}', "more_body": False}, {"type": "http.disconnect"}]
    assert half.sent[0]["status"] == 200


@pytest.mark.fault(
    point="who may change a server",
    did="A caller has a wrong lease",
    happens="409 before the body is read",
    within=20,
)
async def test_a_wrong_token_is_refused_before_its_body_is_read(call):
    await call.lease()
    half = HalfBody(call, {**HAS_KEY, "x-vgen-lease": "wrong"})
    await half.task
    assert half.sent[0]["status"] == 409


async def test_the_body_of_a_change_has_a_limit(call, monkeypatch):
    monkeypatch.setattr(middleware, "_CHANGE_LIMIT", 10)
    assert (await call("POST", "/update_weights", b" " * 10))[0] == 200
    assert (await call("POST", "/update_weights", b" " * 11))[0] == 413


async def test_the_launcher_chooses_the_instance(call, monkeypatch):
    _, drawn = await call("GET", "/vgen/instance", headers={})
    assert len(drawn["instance"]) == 16
    monkeypatch.setenv("VGEN_INSTANCE", "the-launchers")
    assert (await Caller()("GET", "/vgen/instance", headers={})) == (200, {"instance": "the-launchers"})


@pytest.mark.fault(
    point="who may change a server",
    did="The lease is taken over during a call of its holder",
    happens="The old holder does not get it back",
    within=20,
)
async def test_one_who_was_fenced_in_mid_call_does_not_get_the_lease_back(call):
    first = await call.lease()

    async def long() -> None:
        await call.lease("second", takeover=True)

    call.app.answers["/update_weights"] = long
    await call("POST", "/update_weights", headers=first)
    assert (await call("POST", "/pause", headers=first))[0] == 409


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        b"{",
        {"holder": ""},
        {"holder": 3},
        {"holder": "x" * 201},
        {"holder": "x", "ttl_seconds": 0},
        {"holder": "x", "ttl_seconds": "1"},
        {"holder": "x", "ttl_seconds": True},
        {"holder": "x", "ttl_seconds": float("nan")},
        {"holder": "x", "takeover": "yes"},
    ],
)
async def test_a_senseless_request_for_a_lease_is_refused(call, body):
    status, answer = await call("POST", "/vgen/lease", body)
    assert (status, answer["error"]["type"]) == (400, "vgen_bad_request")


@pytest.mark.fault(
    point="a call's body on the server",
    did="A body is longer than the limit",
    happens="413, without reading it to its end",
    within=20,
)
async def test_too_long_a_body_is_not_read_to_its_end(call):
    assert (await call("POST", "/vgen/lease", b" " * 100_000))[0] == 413


async def test_an_unknown_route_of_vgens_own_is_not_found(call):
    assert (await call("GET", "/vgen/lease"))[0] == 404
    assert call.app.reached == []


# The weights' state


async def test_info_says_what_there_is(call):
    token = (await call.lease())["x-vgen-lease"]
    _, info = await call("GET", "/vgen/info")
    assert {"batch", "control_key", "lease", "pause", "weights_state"} == set(info["features"])
    assert (info["lease"]["holder"], info["weights"], info["model"]) == ("me", "ready", None)
    assert token not in str(info)


@pytest.mark.parametrize("failure", [500, RuntimeError("an answer is made of it further out")])
@pytest.mark.parametrize("path", ["/update_weights", "/finish_weight_update"])
@pytest.mark.fault(
    point="a server that restarts or fails an update",
    did="An update fails on the server",
    happens="Inference is refused until one succeeds",
    within=20,
)
async def test_after_a_failed_update_nothing_is_inferred_until_one_succeeds(call, path, failure):
    await call("POST", "/start_weight_update")
    call.app.answers[path] = failure
    if isinstance(failure, Exception):
        with pytest.raises(RuntimeError, match="further out"):
            await call("POST", path)
    else:
        await call("POST", path)
    del call.app.answers[path]
    await call("POST", "/finish_weight_update")  # of the update that has failed already
    status, answer = await call("POST", "/v1/completions", headers={})
    assert (status, answer["error"]["type"]) == (503, "vgen_weights")
    assert (await call("GET", "/v1/models", headers={}))[0] == 200
    for step in ("/start_weight_update", "/update_weights", "/finish_weight_update"):
        await call("POST", step)
    assert (await call("POST", "/v1/completions", headers={}))[0] == 200


@pytest.mark.parametrize(
    ("before", "status", "after"),
    [
        ("ready", 200, "ready"),
        ("ready", 409, "ready"),
        ("ready", 500, "failed"),
        ("failed", 200, "ready"),
        ("failed", 409, "failed"),
        ("failed", 500, "failed"),
    ],
)
@pytest.mark.fault(
    point="a server that restarts or fails an update",
    did="An update in one call fails after it began",
    happens="The server counts as half updated",
    within=20,
)
async def test_an_update_in_one_call_fails_as_a_whole_unless_it_was_refused(call, before, status, after):
    call.app.answers["/vgen/weights"] = {"ready": 200, "failed": 500}[before]
    await call("POST", "/vgen/weights")
    call.app.answers["/vgen/weights"] = status
    assert (await call("POST", "/vgen/weights"))[0] == status
    assert (await call("GET", "/vgen/info"))[1]["weights"] == after
    assert (await call("POST", "/v1/completions"))[0] == (200 if after == "ready" else 503)


async def test_an_update_in_one_call_needs_a_paused_server_and_keeps_it_so(call):
    call.app.paused = False
    assert (await call("POST", "/vgen/weights"))[0] == 409
    assert "/vgen/weights" not in call.app.reached
    call.app.paused = True

    async def long() -> None:
        assert (await call("POST", "/resume"))[0] == 409

    call.app.answers["/vgen/weights"] = long
    assert (await call("POST", "/vgen/weights"))[0] == 200
    assert (await call("POST", "/resume"))[0] == 200


async def test_weights_that_came_another_way_are_vouched_for_by_their_version(call):
    await call("POST", "/start_weight_update")
    call.app.answers["/update_weights"] = 500
    await call("POST", "/update_weights")
    await call("POST", "/update_weight_version", {"new_version": "5"})
    assert (await call("POST", "/v1/completions"))[0] == 200


async def test_a_scheduler_step_during_an_update_is_prevented(call):
    call.app.paused = False
    assert (await call("POST", "/start_weight_update"))[0] == 409
    call.app.paused = True
    assert (await call("POST", "/start_weight_update"))[0] == 200
    for path in ("/resume", "/wake_up"):
        assert (await call("POST", path))[0] == 409
    await call("POST", "/finish_weight_update")
    assert (await call("POST", "/resume"))[0] == 200


async def test_an_update_whose_client_is_gone_has_failed_and_is_not_resumed(call):
    first = await call.lease("first", ttl_seconds=10)
    await call("POST", "/start_weight_update", headers=first)
    assert (await call("GET", "/vgen/info"))[1]["weights"] == "updating"
    assert (await call("POST", "/v1/completions", headers={}))[0] == 200  # it waits for the update to end
    call.clock.now += 11
    for holds in ({}, await call.lease("second")):
        assert (await call("GET", "/vgen/info"))[1]["weights"] == "failed"
        status, answer = await call("POST", "/v1/completions", headers={})
        assert (status, answer["error"]["type"]) == (503, "vgen_weights")
        assert (await call("POST", "/resume", headers={**HAS_KEY, **holds}))[0] == 409  # layers are on the meta device
    for step in ("/start_weight_update", "/update_weights", "/finish_weight_update"):
        assert (await call("POST", step, headers=holds))[0] == 200
    assert (await call("GET", "/vgen/info"))[1]["weights"] == "ready"


async def test_a_server_whose_trainer_was_killed_between_two_wake_ups_is_woken_by_the_next_one(call):
    first = await call.lease("first", ttl_seconds=10)
    await call("POST", "/start_weight_update", headers=first)
    assert (await call("POST", "/wake_up", headers=first))[0] == 409
    call.clock.now += 11
    second = await call.lease("second")
    call.app.reached.clear()
    assert (await call("POST", "/wake_up", headers=second))[0] == 200
    assert call.app.reached == ["engine: abort", "/wake_up"]  # a request that waited would meet layers without weights
    assert (await call("POST", "/v1/completions", headers={}))[0] == 503
    for step in ("/start_weight_update", "/update_weights", "/finish_weight_update", "/resume", "/v1/completions"):
        assert (await call("POST", step, headers=second))[0] == 200


async def test_without_a_lease_an_update_lasts_until_it_is_finished(call):
    await call("POST", "/start_weight_update")
    await call.lease("another", ttl_seconds=10)
    assert (await call("GET", "/vgen/info"))[1]["weights"] == "updating"
    assert (await call("POST", "/v1/completions", headers={}))[0] == 200


# The engine's health


class Health:
    problem = ""
    changes = looks = 0

    def look(self) -> None:
        self.looks += 1

    @contextmanager
    def changing(self):
        self.changes += 1
        yield


@pytest.fixture
def health(call):
    call.middleware._health = Health()
    return call.middleware._health


async def test_while_the_engine_cannot_work_whoever_needs_it_is_told_why(call, health):
    mine = await call.lease()
    health.problem = "the engine is stopped"
    needs = [("GET", path) for path in ("/health", "/ping", "/v1/models", "/is_paused", "/server_info")]
    for method, path in [*needs, *(("POST", path) for path in ("/v1/completions", "/tokenize", *CHANGES))]:
        status, answer = await call(method, path, headers=mine)
        assert (status, answer["error"]["type"], answer["error"]["message"]) == (503, "vgen_engine", health.problem)
    assert call.app.reached == []
    for method, path in (("GET", "/metrics"), ("GET", "/version"), ("GET", "/vgen/instance")):
        assert (await call(method, path, headers={}))[0] == 200
    assert (await call("GET", "/vgen/info"))[1]["problem"] == health.problem
    assert (await call("POST", "/vgen/lease/renew", headers=mine))[0] == 200
    assert (await call("GET", "/is_paused", headers={}))[0] == 401  # still
    health.problem = ""
    health.looks = 0
    assert (await call("GET", "/health", headers={}))[0] == 200
    assert health.looks == 1  # it says what is true now


async def test_a_call_that_changes_the_server_may_have_the_engine_wait(call, health):
    during: list[int] = []

    async def note() -> None:
        during.append(health.changes)

    call.app.answers = dict.fromkeys(("/update_weights", "/v1/completions"), note)
    await call("POST", "/update_weights")
    await call("POST", "/v1/completions")
    assert during == [1, 1]


async def test_the_servers_life_is_watched_and_its_end_is_bounded(call):
    pytest.importorskip("starlette", reason="starlette is not installed")
    pytest.importorskip("psutil", reason="psutil is not installed")
    from starlette.applications import Starlette

    app, engine = Starlette(), SimpleNamespace(errored=True)
    app.state.server = SimpleNamespace(config=SimpleNamespace(timeout_graceful_shutdown=None), should_exit=False)
    app.state.engine_client = engine

    async def live(scope, receive, send) -> None:
        async with asyncio.timeout(10):
            while not app.state.server.should_exit:
                await asyncio.sleep(0.01)

    call.middleware.app = live
    await call.middleware({"type": "lifespan", "app": app}, None, None)
    assert app.state.server.config.timeout_graceful_shutdown == middleware.GRACEFUL_SECONDS
    assert app.state.vgen_health.gone


# Two resumes in a row


@pytest.mark.parametrize("path", ["/resume", "/wake_up"])
async def test_an_engine_that_runs_is_not_resumed_again(call, path):
    async def resume() -> None:
        await asyncio.sleep(0)
        call.app.paused = False

    call.app.answers[path] = resume
    answers = await asyncio.gather(*(call("POST", path) for _ in range(3)))
    assert [status for status, _ in answers] == [200, 200, 200]
    assert call.app.reached == [path]
    call.app.paused = True
    await call("POST", path)
    assert call.app.reached == [path, path]


async def test_engines_that_do_not_agree_or_do_not_tell_are_resumed(call):
    async def disagree() -> bool:
        raise RuntimeError("Engines returned different is_scheduler_paused results")

    call.app.is_paused = disagree
    assert (await call("POST", "/resume"))[0] == 200
    del call.app.state.engine_client
    assert (await call("POST", "/resume"))[0] == 200
    assert call.app.reached == ["/resume", "/resume"]
