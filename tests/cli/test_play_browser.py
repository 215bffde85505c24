"""``diffaccel play`` in headless Chromium: the page shows frames, and keys choose the action."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest
import torch

from diffaccel.cli.play import make_app
from diffaccel.cli.play_session import PlaySession
from diffaccel.samplers import NextFrameSampler
from scripts.browser import Page, find_browser, opened
from tests.support.worlds import tiny_world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium"),
    pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="aiohttp is not installed"),
]


def test_keys_choose_the_action():
    from aiohttp import web
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
            async with opened(f"http://127.0.0.1:{port}/") as page:
                await play(page)
        finally:
            await runner.cleanup()

    async def play(page: Page) -> None:
        await page.until("document.getElementById('action').textContent === '4'")
        assert "Arrow keys" in await page.value("document.getElementById('keys').textContent")
        blank = "Array.from(screen_.getContext('2d').getImageData(0, 0, 8, 8).data).every((v, i) => v === 0)"
        await page.value("window.screen_ = document.getElementById('screen')")
        assert not await page.value(blank)
        for key, action in (("ArrowRight", 7), ("3", 3)):
            await page.key(key)
            await page.until(f"document.getElementById('action').textContent === '{action}'")
            assert game.action == action
            await page.key(key, "keyUp")
            await page.until("document.getElementById('action').textContent === '4'")
        await page.until("Number(document.getElementById('latency').textContent) > 0")
        await page.until("Number(document.getElementById('fps').textContent) > 0")

    asyncio.run(asyncio.wait_for(main(), 150))
