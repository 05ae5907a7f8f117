"""vgen's routes for a weight update, in the server: a whole update in one call, and a pause without a wait.

vLLM's `/pause` sleeps for 20 ms after the engine has paused, so that callers receive the last outputs first. A sync
that copies for 2 ms should not wait that long.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, get_args

from ...engine_protocol import PauseMode
from ...weights.transports.sync_errors import UNKNOWN_HANDLES, as_sync_error
from ..server_api import PAUSE, WEIGHTS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


async def pause(request: Request) -> Response:
    """As vLLM's `/pause`: `mode` is `keep`, `wait` or `abort`."""
    mode = request.query_params.get("mode", "keep")
    if mode not in get_args(PauseMode):
        return _error(400, f"there is no pause mode {mode!r}")
    engine = request.app.state.engine_client
    try:
        pause_scheduler = engine.engine_core.pause_scheduler_async
    except AttributeError:  # a vLLM whose engine core has no such method
        await engine.pause_generation(mode=mode)
    else:
        await pause_scheduler(mode=mode, clear_cache=True)
    return _answer(200, {"status": "paused"})


async def update_in_one_call(request: Request) -> Response:
    """A whole weight update with one `update_info`, after an `init_info` if there is one.

    Answers an error with its `reason` as a code: see `weights.transports.sync_errors`. The status is 409 if the worker
    does not know the handles, and has changed nothing.
    """
    from vllm.distributed.weight_transfer import base

    engine = request.app.state.engine_client
    try:
        body = json.loads(await request.body())
        update, init, version = dict(body["update_info"]), body.get("init_info"), body.get("weight_version")
    except (ValueError, KeyError, TypeError, AttributeError):
        return _error(400, "the body must be JSON with an `update_info`")
    try:
        if init is not None:
            await engine.init_weight_transfer_engine(base.WeightTransferInitRequest(init_info=init))
        try:
            await engine.start_weight_update()
        except Exception:
            # vLLM (0.32) refuses to start if an update is open, but its error has no code. vgen's worker knows it, too,
            # and raises an error with a code if it is introduced to nothing.
            await engine.init_weight_transfer_engine(base.WeightTransferInitRequest(init_info={}))
            raise
        await engine.update_weights(request=base.WeightTransferUpdateRequest(update_info=update))
        await engine.finish_weight_update(version)
    except Exception as error:
        reason = as_sync_error(error).reason
        return _error(409 if reason == UNKNOWN_HANDLES else 500, str(error) or type(error).__name__, reason)
    return _answer(200, {"weight_version": version})


ROUTES = {PAUSE: pause, WEIGHTS: update_in_one_call}
"""The function that answers a POST, by path."""


def _error(status: int, message: str, reason: str | None = None) -> Response:
    return _answer(status, {"error": {"message": message, "type": "weights", "code": status, "reason": reason}})


def _answer(status: int, body: dict[str, Any]) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(body, status)
