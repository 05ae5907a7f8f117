"""The option objects: frozen, by keyword only, with the defaults of the engine that they configure."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, asdict

import pytest

from vgen import RequestTracing, ServerConnection, WeightSyncOptions

OPTIONS = [RequestTracing, ServerConnection, WeightSyncOptions]


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_are_frozen_and_by_keyword(kind):
    options = kind()
    name, value = next(iter(asdict(options).items()))
    with pytest.raises(FrozenInstanceError):
        setattr(options, name, value)
    with pytest.raises(TypeError):
        kind(value)


@pytest.mark.parametrize("kind", [ServerConnection, WeightSyncOptions])
def test_defaults_are_those_of_the_engine(kind):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")
    from vgen.engines.client.engine import ServerEngine

    engine = inspect.signature(ServerEngine).parameters
    shared = {name: value for name, value in asdict(kind()).items() if name in engine}
    assert len(shared) >= 3
    assert shared == {name: engine[name].default for name in shared}
