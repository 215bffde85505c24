"""``diffaccel play`` in headless Chromium: the page shows frames, and keys choose the action."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffaccel.cli.play import make_app
from diffaccel.cli.play_session import PlaySession
from diffaccel.samplers import NextFrameSampler
from tests.support.worlds import tiny_world

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium"),
    pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="aiohttp is not installed"),
]


class Page:
    """A page of a browser, over its debugging protocol."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_str(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (answer := json.loads((await self.socket.receive()).data)).get("id") != self.number:
            pass
        return answer["result"]

    async def value(self, expression: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=expression))["result"].get("value")

    async def until(self, expression: str) -> None:
        for _ in range(300):
            if await self.value(expression):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{expression} did not become true: {await self.value('document.body.innerText')}")


async def opened(client: Any, profile: Path, address: str) -> tuple[Any, str]:
    """Start the browser on a page; return its process and the address of the page's debugging socket."""
    process = await asyncio.create_subprocess_exec(
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
        f"--user-data-dir={profile}", address, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(600):
        if (told := profile / "DevToolsActivePort").is_file() and (port := told.read_text().split("\n")[0]):
            async with client.get(f"http://127.0.0.1:{port}/json") as answer:
                for page in await answer.json():
                    if page["type"] == "page" and page["url"].startswith(address):
                        return process, page["webSocketDebuggerUrl"]
        await asyncio.sleep(0.1)
    process.kill()
    raise AssertionError("the browser did not open the page")


def test_keys_choose_the_action(tmp_path):
    from aiohttp import ClientSession, web
    from aiohttp.test_utils import unused_port

    sampler = NextFrameSampler(tiny_world(torch.float32, num_actions=9), 1, draft=1)
    sampler.reset()
    game = PlaySession(sampler)

    async def main() -> None:
        port = unused_port()
        runner = web.AppRunner(make_app(game, 15.0, "127.0.0.1", port))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            async with ClientSession() as client:
                process, address = await opened(client, tmp_path, f"http://127.0.0.1:{port}/")
                try:
                    async with client.ws_connect(address, max_msg_size=0) as socket:
                        await play(Page(socket))
                finally:
                    process.kill()
                    await process.wait()
        finally:
            await runner.cleanup()

    async def play(page: Page) -> None:
        await page.until("document.getElementById('action').textContent === '4'")
        assert "Arrow keys" in await page.value("document.getElementById('keys').textContent")
        blank = "Array.from(screen_.getContext('2d').getImageData(0, 0, 8, 8).data).every((v, i) => v === 0)"
        await page.value("window.screen_ = document.getElementById('screen')")
        assert not await page.value(blank)
        for key, action in (("ArrowRight", 7), ("3", 3)):
            await page.call("Input.dispatchKeyEvent", type="keyDown", key=key)
            await page.until(f"document.getElementById('action').textContent === '{action}'")
            assert game.action == action
            await page.call("Input.dispatchKeyEvent", type="keyUp", key=key)
            await page.until("document.getElementById('action').textContent === '4'")
        await page.until("Number(document.getElementById('latency').textContent) > 0")
        await page.until("Number(document.getElementById('fps').textContent) > 0")

    asyncio.run(asyncio.wait_for(main(), 150))
