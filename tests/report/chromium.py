"""Drive a headless Chromium by its DevTools protocol: open a file, run JavaScript, see requests."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
BINARY = next((found for name in NAMES if (found := shutil.which(name))), None)

needs_chromium = [
    pytest.mark.chromium,
    pytest.mark.skipif(BINARY is None, reason="no Chromium: apt-get install chromium"),
]


class Tab:
    """A page; `events` has everything that Chromium told about it."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            value = json.loads(message.data)
            if "id" in value:
                self._answers.pop(value["id"]).set_result(value)
            else:
                self.events.append(value)

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        value = await asyncio.wait_for(answer, 30)
        assert "error" not in value, value
        return value["result"]

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; an exception in it fails the test."""
        found = await self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def open(self, path: Path) -> None:
        await self.send("Page.navigate", url=path.resolve().as_uri())
        await self.wait_for("Page.loadEventFired")

    async def wait_for(self, method: str) -> None:
        async with asyncio.timeout(30):
            while not self.named(method):
                await asyncio.sleep(0.02)

    def named(self, method: str) -> list[dict[str, Any]]:
        """The parameters of every event of this name so far."""
        return [event["params"] for event in self.events if event["method"] == method]

    async def press(self, key: str, text: str = "") -> None:
        codes = {"Escape": 27, "Enter": 13, "ArrowDown": 40, "ArrowUp": 38, "Tab": 9}
        code = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
        text = {"Enter": "\r"}.get(key, text or (key if len(key) == 1 else ""))
        down = {"type": "keyDown", "key": key, **code} | ({"text": text} if text else {})
        await self.send("Input.dispatchKeyEvent", **down)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    async def resize(self, width: int, height: int, scheme: str = "light") -> None:
        mobile = width < 600
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile},
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.send("Emulation.setEmulatedMedia", features=features)

    async def picture(self, path: Path) -> None:
        found = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.asynccontextmanager
async def new_tab(switches: Sequence[str] = ()) -> AsyncIterator[Tab]:
    """A tab of a Chromium of its own, whose profile goes when it does."""
    import aiohttp

    assert BINARY is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BINARY, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", *switches]
        command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **quiet)
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [each for each in await answer.json() if each["type"] == "page"]
                address = pages[0]["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    tab = Tab(socket)
                    for domain in ("Page", "Runtime", "Network", "Log"):
                        await tab.send(f"{domain}.enable")
                    yield tab
                    await tab.send("Browser.close")
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


async def _port(path: Path) -> int:
    async with asyncio.timeout(60):
        while not path.exists() or not path.read_text().strip():
            await asyncio.sleep(0.05)
    return int(path.read_text().splitlines()[0])
