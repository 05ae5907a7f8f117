"""vgen's routes for a weight update, in the server: what would be three calls in one, and a pause without a rest.

vLLM's `/pause` sleeps for 20 ms after the engine has paused, so that callers see the last outputs first; a sync whose
copy takes two has better uses for them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, get_args

from .base import PauseMode

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

PAUSE, WHOLE = "/vgen/pause", "/vgen/weights"


def install(app: Any) -> None:
    """Add the routes to vLLM's application, behind vLLM's own middleware. May be called any number of times."""
    from starlette.routing import Route

    if not any(getattr(route, "path", None) == WHOLE for route in app.router.routes):
        app.router.routes[:0] = [Route(PAUSE, pause, methods=["POST"]), Route(WHOLE, whole, methods=["POST"])]


async def pause(request: Request) -> Response:
    """As vLLM's `/pause`: `mode` is `keep`, `wait` or `abort`."""
    mode = request.query_params.get("mode", "keep")
    if mode not in get_args(PauseMode):
        return _refused(400, f"there is no pause mode {mode!r}")
    engine = request.app.state.engine_client
    try:
        core = engine.engine_core.pause_scheduler_async
    except AttributeError:  # another vLLM's
        await engine.pause_generation(mode=mode)
    else:
        await core(mode=mode, clear_cache=True)
    return _answer(200, {"status": "paused"})


async def whole(request: Request) -> Response:
    """An update that one `update_info` is all of, from start to finish, after an `init_info` where there is one.

    409 where the worker does not know what it is told of, and has changed nothing.
    """
    from vllm.distributed.weight_transfer import base

    from ..weights.resident import UNKNOWN

    engine = request.app.state.engine_client
    try:
        body = json.loads(await request.body())
        update, init, version = dict(body["update_info"]), body.get("init_info"), body.get("weight_version")
    except (ValueError, KeyError, TypeError, AttributeError):
        return _refused(400, "the body must be JSON with an `update_info`")
    try:
        if init is not None:
            await engine.init_weight_transfer_engine(base.WeightTransferInitRequest(init_info=init))
        await engine.start_weight_update()
        await engine.update_weights(request=base.WeightTransferUpdateRequest(update_info=update))
        await engine.finish_weight_update(version)
    except Exception as error:
        return _refused(409 if UNKNOWN in str(error) else 500, str(error) or type(error).__name__)
    return _answer(200, {"weight_version": version})


def _refused(status: int, message: str) -> Response:
    return _answer(status, {"error": {"message": message, "type": "weights", "code": status}})


def _answer(status: int, body: dict[str, Any]) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(body, status)
