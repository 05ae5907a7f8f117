from __future__ import annotations

import importlib.util
import sys
import textwrap

import pytest

from vgen.engines.server import launcher


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


@pytest.fixture
def instead(monkeypatch):
    """Runs a line of Python in place of vLLM."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed, and start_server looks for it")

    def install(code: str) -> None:
        def run(*_, port: int, **__) -> list[str]:
            return [sys.executable, "-c", textwrap.dedent(code).replace("PORT", str(port))]

        monkeypatch.setattr(launcher, "server_command", run)

    return install


@pytest.fixture
def call():
    """Calls the control middleware; its `app`, `clock` and `middleware` are at hand."""
    pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")
    from helpers.control_calls import Caller

    return Caller()
