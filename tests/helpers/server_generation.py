"""A small `ServerGeneration` over `FaultyServer`s, and what tests ask of both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vgen import Completions, ServerConnection, ServerGeneration
from vgen.testing import FaultyServer

PROMPTS = [[i, i + 1, i + 2] for i in range(20)]
COMPLETIONS, BATCH = "/v1/completions", "/inference/vgen/generate"


class Model(torch.nn.Module):
    """A trainer's model of one weight, with a vocabulary of 100 tokens."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))


def generation(
    *servers: FaultyServer,
    timeout: float = 20.0,
    request_timing: bool = True,
    takeover: bool = False,
    frozen: bool = False,
    **more: Any,
) -> ServerGeneration:
    """Of a trainer's `Model`, which goes to the servers before the first completion; with `frozen` without a model."""
    connection = ServerConnection(timeout=timeout, request_timing=request_timing, takeover=takeover)
    model = None if frozen else Model()
    return ServerGeneration(model, base_urls=[server.url for server in servers], connection=connection, **more)


def tokens(rollouts: Completions) -> list[list[int]]:
    return [completion.token_ids for completion in rollouts]


def calls(server: FaultyServer, path: str) -> list[Any]:
    """The bodies of the requests to `path` that the server has received."""
    return [body for seen, _, body in server.seen if seen.partition("?")[0] == path]
