"""Finds out what a server is: vLLM's version, the model, vgen's features, whether it is a router."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from ...errors import EngineError, ServerError
from .. import kv_stores
from ..refusal_reasons import RefusalReason
from ..server_api import INFO
from .endpoint import PROBE_SECONDS, Endpoint, held_version, stock_config
from .http import HttpClient
from .router import is_router

logger = logging.getLogger(__name__)

OLDEST_VLLM = 0, 30
_DEFINITION = ("model", "revision", "hf_config_path", "hf_overrides", "dtype", "quantization", "model_impl")
"""The arguments of a server that decide which tensors its model has. Code beside the weights is not run here."""


async def discover(http: HttpClient, shape: Collection[str] = ()) -> Endpoint:
    """Ask a server what it is and can do.

    Args:
        http: The client for the server.
        shape: Names of the model's sizes that the caller wants to compare (`vocab_size`, `embedding_dim`, …).

    Raises:
        ServerError: The server cannot be reached, or refuses the API key.
        EngineError: It is not a vLLM server, or its vLLM is too old.
    """
    try:
        endpoint = await _described(http, shape)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise EngineError(f"{http.name} does not answer as a vLLM server does: is it one?") from error
    if endpoint.controlled:
        with suppress(ServerError):
            endpoint.weight_version = await held_version(http)
    return endpoint


async def _described(http: HttpClient, shape: Collection[str]) -> Endpoint:
    """As `discover`, for a server whose answers have the right form."""
    model = dict((await http.get("/v1/models", timeout=PROBE_SECONDS))["data"][0])
    endpoint = Endpoint(http, str(model["id"]), int(model["max_model_len"]))
    version = await _check_version(http)
    info = await _vgen_info(http)
    endpoint.features = frozenset(info.get("features", ()))
    logprobs_mode = None
    if "lease" in endpoint.features:  # the server describes itself only if the control key is right
        logprobs_mode = _apply_vgen_info(endpoint, info)
    elif not endpoint.features:
        logprobs_mode = await _apply_stock_info(endpoint)
        endpoint.definition |= {"vllm_version": version}
    if not endpoint.shape:
        endpoint.shape = await _stock_shape(endpoint, shape)
    if logprobs_mode not in (None, "processed_logprobs"):
        message = "vgen: %s returns %s, which are not the log-probabilities that tokens were sampled with: "
        logger.warning(message + "start it with --logprobs-mode processed_logprobs", http.name, logprobs_mode)
    await _find_limits(endpoint)
    return endpoint


async def require_running(endpoint: Endpoint) -> None:
    """Raise `EngineError` if a server is paused or asleep, and no trainer has it who could start it again.

    A server that a trainer has, or may have, is only logged: the trainer may pause it for a weight sync.
    """
    if not (problem := await endpoint.why_stopped()):
        return
    if "lease" in endpoint.features and await endpoint.holder() == "":
        raise EngineError(f"{endpoint.name}: {problem}")
    logger.warning("vgen: %s: %s", endpoint.name, problem)


async def _find_limits(endpoint: Endpoint) -> None:
    """Log what the server cannot do, and remove `controlled` and `features` from a router."""
    if (endpoint.features or endpoint.controlled) and await is_router(endpoint.http, stock=not endpoint.features):
        # A change would reach only one of the servers behind it. And a router may not forward the batch route.
        endpoint.features, endpoint.controlled = frozenset(), False
        state, endpoint.fix = "a router", "name the servers behind it in base_urls"
    elif endpoint.controlled:
        if endpoint.stock:
            transports = f"checkpoints or vLLM's own {endpoint.backend} engine" if endpoint.backend else "checkpoints"
            message = "vgen: %s was not started by `vgen serve`: it gets weights through %s, and its completions have "
            logger.info(message + "either timing or weight versions", endpoint.name, transports)
        return
    elif endpoint.features:
        state, endpoint.fix = "asking for a control key", "pass control_key"
    else:
        state = "not in development mode"
        endpoint.fix = "start it with `vgen serve`, or with VLLM_SERVER_DEV_MODE=1"
    message = "vgen: %s is %s: it generates, but weight sync, sleep and pause are not possible; %s"
    logger.warning(message, endpoint.name, state, endpoint.fix)


async def _check_version(http: HttpClient) -> str | None:
    """Refuse a vLLM that is too old. A server that does not tell its version (None), as some routers, is accepted."""
    try:
        version = str((await http.get("/version", timeout=PROBE_SECONDS))["version"])
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    except (ServerError, KeyError, TypeError, ValueError):
        return None
    if numbers < OLDEST_VLLM:
        oldest = ".".join(map(str, OLDEST_VLLM))
        raise EngineError(f"{http.name} runs vLLM {version}, and vgen needs {oldest} or newer: upgrade the server")
    return version


async def _vgen_info(http: HttpClient) -> dict[str, Any]:
    """What a server that `vgen serve` started tells of itself; empty for any other server."""
    try:
        info = await http.get(INFO, timeout=PROBE_SECONDS)
        return info if isinstance(info, dict) else {}
    except ServerError as error:
        if error.reason == RefusalReason.CONTROL_KEY:
            return {"features": ["batch"]}  # inference needs no control key
        if error.status is None:
            raise
    return {}


def _apply_vgen_info(endpoint: Endpoint, info: Mapping[str, Any]) -> str | None:
    """Take what `/vgen/info` tells; returns vLLM's `logprobs_mode`."""
    endpoint.controlled = True
    endpoint.device_type, endpoint.dtype = str(info.get("device")), str(info.get("dtype"))
    endpoint.quantization = info.get("quantization")
    endpoint.moves_experts = bool(info.get("enable_eplb"))
    endpoint.kv_store_refusal = str(info.get("kv_store_refusal") or "")
    endpoint.max_num_seqs = int(info.get("max_num_seqs") or endpoint.max_num_seqs)
    endpoint.shape = dict(info.get("shape") or {})
    endpoint.host, endpoint.workers = str(info.get("host") or ""), int(info.get("world_size") or 1)
    return info.get("logprobs_mode")


async def _apply_stock_info(endpoint: Endpoint) -> str | None:
    """Take what a stock server in development mode tells; returns vLLM's `logprobs_mode`.

    The configuration comes from `vllm/entrypoints/serve/dev/server_info/api_router.py`. Without development mode the
    route does not exist, and the endpoint stays uncontrolled.
    """
    http, logprobs_mode = endpoint.http, None
    with suppress(ServerError, KeyError, TypeError, ValueError):
        config = await stock_config(http)
        model = config["model_config"]
        endpoint.controlled, logprobs_mode = True, model["logprobs_mode"]
        endpoint.definition = {name: model.get(name) for name in _DEFINITION}
        endpoint.device_type = str(config["device_config"]["device"])
        endpoint.dtype = str(model.get("dtype")).removeprefix("torch.")
        endpoint.quantization = model.get("quantization")
        endpoint.moves_experts = bool(config.get("parallel_config", {}).get("enable_eplb"))
        endpoint.kv_store_refusal = kv_stores.refusal(config) or ""
        endpoint.max_num_seqs = int(config.get("scheduler_config", {}).get("max_num_seqs") or endpoint.max_num_seqs)
        if transfer := config.get("weight_transfer_config"):
            endpoint.backend = str(transfer["backend"])
            endpoint.workers = int((await http.get("/get_world_size", timeout=PROBE_SECONDS))["world_size"])
    return logprobs_mode


async def _stock_shape(endpoint: Endpoint, wanted: Collection[str]) -> dict[str, int]:
    """The sizes of its model that a stock server reveals. Nothing is generated."""
    shape = {"vocab_size": await _stock_vocabulary_size(endpoint)}
    if "embedding_dim" in wanted and endpoint.stock:
        shape["embedding_dim"] = await _stock_embedding_width(endpoint)
    return {name: size for name, size in shape.items() if size is not None}


async def _stock_vocabulary_size(endpoint: Endpoint) -> int | None:
    """The vocabulary's size, out of the message by which vLLM refuses a bias on a token that does not exist.

    No route of vLLM has this number. The message is in `vllm/sampling_params.py`, `_validate_logit_bias`.
    """
    request = {"model": endpoint.model, "prompt": [0], "max_tokens": 1, "logit_bias": {str(2**31 - 1): 1.0}}
    try:
        await endpoint.http.infer("/v1/completions", msgspec.json.encode(request), {}, len, PROBE_SECONDS)
    except ServerError as error:
        match = re.search(r"Vocabulary size: (\d+)", error.server_message)
        return int(match[1]) if match else None
    return None


async def _stock_embedding_width(endpoint: Endpoint) -> int | None:
    """The width of the embeddings, out of the printed modules that development mode shows.

    The text comes from `get_model_inspection` in `vllm/v1/worker/worker_base.py`, and its line about the embeddings
    from `VocabParallelEmbedding.extra_repr` in `vllm/model_executor/layers/vocab_parallel_embedding.py`.
    """
    with suppress(ServerError, KeyError, TypeError, IndexError):
        call = {"method": "get_model_inspection"}
        text = (await endpoint.http.post("/collective_rpc", call, timeout=PROBE_SECONDS))["results"][0]
        if match := re.search(r"VocabParallelEmbedding\([^)]*\bembedding_dim=(\d+)", text):
            return int(match[1])
    return None
