"""What the tests of several transports share: a client of a server's routes, endpoints, and sources that fail."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vgen._addresses import this_host
from vgen.weights.source.module_source import ModuleSource
from vgen.weights.transports.collective import CollectiveTransport
from vgen.weights.transports.shared_memory import SharedMemoryTransport
from vgen.weights.transports.weight_transport import TransportSettings

WARM = list(range(100)) * 2
SMALL = 100_000
"""A bucket size of which the tiny model needs a dozen, and which cuts its fused layers in two."""
PLUGIN = frozenset({"shared_memory", "group_with_secret", "resident"})
"""The features of a server with vgen's plugin, as far as transports ask for them."""


@dataclass
class FakeEndpoint:
    """What a transport knows of a server."""

    name: str = "http://127.0.0.1:1"
    features: frozenset[str] = frozenset()
    device_type: str = "cpu"
    devices: frozenset[str] | None = None
    host: str = field(default_factory=this_host)
    workers: int = 1
    backend: str | None = None
    restarts: int = 0

    @property
    def stock(self) -> bool:
        return not self.features


class FakeGroup:
    """Servers behind one client of vLLM's protocol. It counts whose seconds were asked for."""

    def __init__(self, client: Any, *endpoints: FakeEndpoint) -> None:
        self.endpoints = endpoints or (FakeEndpoint(),)
        self.recorded: list[str] = []
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def record_seconds(self, span: Any, method: str) -> None:
        self.recorded.append(method)


class Trace:
    """A `SyncTrace` that keeps the names and the attributes of its phases."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, dict[str, Any]]] = []

    @contextmanager
    def phase(self, name: str, /) -> Generator[Any]:
        attributes: dict[str, Any] = {}
        self.phases.append((name, attributes))
        yield type("Span", (), {"set": staticmethod(attributes.update)})

    def set(self, attributes: Mapping[str, Any], /) -> None: ...


def shared_memory(client: Any, *, directory: str | Path | None = None, **settings: Any) -> SharedMemoryTransport:
    """A transport to the server of `client`."""
    transport = SharedMemoryTransport(TransportSettings(**settings), directory=directory)
    transport.client = client
    return transport


def gloo(client: Any, url: str, **settings: Any) -> CollectiveTransport:
    """A transport to the server of `client`, which has one worker."""
    transport = CollectiveTransport(TransportSettings(**settings), "gloo")
    transport.open(FakeGroup(client, FakeEndpoint(url)), ModuleSource(torch.nn.Module()))
    return transport


class Client:
    """vLLM's four methods over a server's routes."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: dict) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version})

    def _post(self, path: str, body: dict) -> None:
        status, answer = self._server.call(path, body)
        if status != 200:
            error = answer.get("error", answer)
            raise RuntimeError(f"{status}: {error.get('message', error) if isinstance(error, dict) else error}")


class Changed:
    """A model's weights, each put through `change`."""

    def __init__(self, model: torch.nn.Module, change: Callable[[str, torch.Tensor], list]) -> None:
        self._source, self._change = ModuleSource(model), change

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._source:
            yield from self._change(name, tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def wrong(model: torch.nn.Module) -> Changed:
    """The weights of `model`, one of them otherwise than it has it."""
    other = "model.layers.1.mlp.down_proj.weight"
    return Changed(model, lambda name, tensor: [(name, tensor + 0.3 if name == other else tensor)])


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)


def synced(server: Any, transport: Any, source: Any = None, version: str = "next") -> None:
    server.done("/pause?mode=abort", {})
    transport.replace_weights(source or ModuleSource(server.model), version)
    assert server.done("/reset_prefix_cache", {}) == {"success": True}
    server.done("/resume", {})


def sample(server: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    wants = {"max_tokens": 16, "temperature": 1.0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    answer = server.done("/v1/completions", {"model": server.folder, "prompt": prompt, **wants})
    (choice,) = answer["choices"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def difference(model: torch.nn.Module, prompt: list[int], token_ids: list[int], logprobs: list[float]) -> float:
    """The largest |Δ| to a teacher-forced forward of `model`."""
    ids = torch.tensor([prompt + token_ids])
    with torch.no_grad():
        own = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    own = own.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return (own - torch.tensor(logprobs)).abs().max().item()


def agrees(server: Any, prompt: list[int] = WARM) -> bool:
    return difference(server.model, prompt, *sample(server, prompt)) <= 1e-4


K_PROJ, LAST, NORM = "model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"


def wrong_shape(of: str) -> Callable:
    return lambda name, tensor: [(name, tensor[1:] if name == of else tensor)]


def missing(of: str) -> Callable:
    return lambda name, tensor: [] if name == of else [(name, tensor)]


def unknown(name: str, tensor: torch.Tensor) -> list:
    return [("model.layers.0.unheard_of.weight" if name == NORM else name, tensor)]


def interrupted(name: str, tensor: torch.Tensor) -> list:
    if name == K_PROJ:
        raise ConnectionResetError("the gather broke off")
    return [(name, tensor)]


FAILURES = [
    (wrong_shape(K_PROJ), K_PROJ, "size"),
    (wrong_shape(LAST), LAST, "was said to come"),
    (missing(K_PROJ), K_PROJ, "does not provide it"),  # the engine's fused layer got its other two thirds
    (missing(NORM), NORM, "does not provide it"),
    (unknown, "model.layers.0.unheard_of.weight", "was said to come"),
    (interrupted, None, "the gather broke off"),
]
"""A change, the parameter that the error names, and a part of what it says."""
FAILURE_NAMES = ["shape", "last-shape", "missing-part", "missing", "unknown", "interrupted"]
