"""A real headless Chromium, driven over its own DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from helpers.waiting import wait_until

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--remote-debugging-port=0",
)
DEADLINE = 60.0


def executable() -> str | None:
    """Where Chromium is, if it is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """One browser with one page. Every call waits for its answer; what happened meanwhile is in `events`."""

    def __init__(self, width: int = 1200, height: int = 800) -> None:
        self.size = width, height
        self.events: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._number = 0

    def __enter__(self) -> Chromium:
        program = executable()
        assert program is not None
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        command = [
            program,
            *FLAGS,
            f"--user-data-dir={self._folder.name}",
            f"--window-size={','.join(map(str, self.size))}",
        ]
        self._process = subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._loop.run_until_complete(self._connect())
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
            width, height = self.size
            self.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self._loop.run_until_complete(self._session.close())
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._loop.close()
        self._folder.cleanup()

    async def _connect(self) -> None:
        import aiohttp

        port = Path(self._folder.name, "DevToolsActivePort")
        end = time.monotonic() + DEADLINE
        self._session = aiohttp.ClientSession()
        while time.monotonic() < end:
            assert self._process.poll() is None, "Chromium has ended"
            with contextlib.suppress(OSError, ValueError, StopIteration, aiohttp.ClientError):
                number = int(port.read_text().split("\n")[0])
                async with self._session.get(f"http://127.0.0.1:{number}/json/list") as answer:
                    pages = await answer.json(content_type=None)
                url = [page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"]
                if url:
                    self._socket = await self._session.ws_connect(url[0], max_msg_size=0)
                    return
            await asyncio.sleep(0.1)
        raise TimeoutError("Chromium does not answer")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A DevTools command's result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), DEADLINE))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            if "method" in message:
                self.events.append(message)

    def open(self, file: Path, *, dark: bool = False) -> Chromium:
        """Load a file and wait until it has drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.wait("performance.getEntriesByName('drawn').length > 0 && document.readyState === 'complete'")
        return self

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        wait_until(lambda: self.evaluate(expression), DEADLINE, every=0.02)

    def settle(self) -> None:
        """Two frames, so that what was asked for is drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event: `mouseMoved`, `mousePressed`, `mouseReleased` or `mouseWheel`."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        self.settle()

    def click(self, x: float, y: float, count: int = 1) -> None:
        """A click of the left button, or a double click."""
        for number in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=number)
        self.settle()

    def press(self, key: str, text: str | None = None) -> None:
        """A key, and the text it gives where it gives any."""
        code = {"Enter": 13, "Escape": 27}.get(key, ord(key[0]))
        text = "\r" if key == "Enter" else text if text is not None or len(key) > 1 else key
        more = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        self.settle()

    def write(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)
        self.settle()

    def screenshot(self, file: Path) -> bytes:
        """The page as a PNG."""
        picture = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        file.write_bytes(picture)
        return picture

    def first_paint(self) -> float:
        """Seconds from the start of the navigation to the first contentful paint, by Chromium's own clock."""
        entry = "performance.getEntriesByName('first-contentful-paint')[0]"
        self.wait(f"{entry} !== undefined")
        return self.evaluate(f"{entry}.startTime") / 1e3

    def said(self, *methods: str) -> list[dict[str, Any]]:
        """Events of these kinds since the page was opened."""
        return [event["params"] for event in self.events if event["method"] in methods]
