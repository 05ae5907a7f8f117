"""Plain ASGI calls of the control middleware, around an application that notes what reaches it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from vgen.engines.server.lease import LeaseBook
from vgen.engines.server.middleware import ControlMiddleware

KEY = "the-control-key"
HAS_KEY = {"x-vgen-control-key": KEY}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class App:
    """Answers everything with 200, or with what `answers` has for the path; an exception there is raised."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.answers: dict[str, Any] = {}
        self.paused = True
        self.state = SimpleNamespace(engine_client=self)

    async def is_paused(self) -> bool:
        return self.paused

    async def is_sleeping(self) -> bool:
        return self.paused

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.reached.append(f"engine: {mode}")

    async def __call__(self, scope, receive, send) -> None:
        self.reached.append(scope.get("path", scope["type"]))
        answer = self.answers.get(scope.get("path", ""), 200)
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            await answer()
            answer = 200
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": answer, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})


class Caller:
    def __init__(self) -> None:
        self.app, self.clock = App(), Clock()
        self.middleware = ControlMiddleware(self.app, key=KEY, leases=LeaseBook(self.clock))

    async def __call__(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **scope: Any
    ) -> tuple[int, Any]:
        sent: list[Any] = []
        raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""

        async def receive():
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message) -> None:
            sent.append(message)

        pairs = [(name.encode(), value.encode()) for name, value in (HAS_KEY if headers is None else headers).items()]
        request = {"type": "http", "method": method, "path": path, "headers": pairs, "app": self.app, **scope}
        await self.middleware(request, receive, send)
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))

    async def lease(self, holder: str = "me", **wants: Any) -> dict[str, str]:
        status, answer = await self("POST", "/vgen/lease", {"holder": holder, **wants})
        assert status == 200, answer
        return {**HAS_KEY, "x-vgen-lease": answer["token"]}
