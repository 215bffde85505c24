"""A page in headless Chromium, over its debugging protocol: look at it, press keys, take its picture."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Return the path of Chromium; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page of a running browser.

    Args:
        socket: to the page's debugger.
    """

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self.number += 1
        await self.socket.send_str(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (answer := json.loads((await self.socket.receive()).data)).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    async def value(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        return (await self.call("Runtime.evaluate", expression=expression))["result"].get("value")

    async def until(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until an expression is true in the page."""
        for _ in range(int(seconds * 10)):
            if await self.value(expression):
                return
            await asyncio.sleep(0.1)
        text = await self.value("document.body.innerText")
        raise TimeoutError(f"{expression} did not become true in {seconds:g} s; the page says: {text}")

    async def key(self, key: str, kind: str = "keyDown") -> None:
        """Press a key, or let it go ("keyUp")."""
        await self.call("Input.dispatchKeyEvent", type=kind, key=key)

    async def picture(self, width: int, height: int) -> bytes:
        """Return the page as PNG, in a window of a width and height in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


@contextlib.asynccontextmanager
async def opened(address: str, browser: str | None = None) -> AsyncIterator[Page]:
    """Open an address in a browser of its own, which ends with the block.

    Raises:
        TimeoutError: when it does not open the page within a minute.
        FileNotFoundError: where there is no Chromium.
    """
    from aiohttp import ClientSession

    browser = browser or find_browser()
    if browser is None:
        raise FileNotFoundError(f"There is no Chromium here: none of {', '.join(NAMES)}. Install one.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--remote-debugging-port=0", f"--user-data-dir={folder}", address, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with ClientSession() as client:
                debugger = await _debugger(client, Path(folder), address)
                async with client.ws_connect(debugger, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            process.kill()
            await process.wait()


async def _debugger(client: Any, profile: Path, address: str) -> str:
    """Return the address of the page's debugger, once the browser has opened it."""
    told = profile / "DevToolsActivePort"
    for _ in range(600):
        if told.is_file() and (port := told.read_text().split("\n")[0]):
            async with client.get(f"http://127.0.0.1:{port}/json") as answer:
                for page in await answer.json():
                    if page["type"] == "page" and page["url"].startswith(address):
                        found: str = page["webSocketDebuggerUrl"]
                        return found
        await asyncio.sleep(0.1)
    raise TimeoutError(f"The browser did not open {address} within a minute.")
