"""Take the picture of ``diffaccel play`` that the README shows: the page as it runs, a key held down.

    python -m scripts.play_picture --out docs/play.png

Serves the page on this machine, opens it in headless Chromium, holds the right arrow key, and now and then the one
that jumps, until so many frames have been drawn, and keeps what the browser shows in as many colours as fit.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from pathlib import Path

from diffaccel.cli import play
from diffaccel.cli.play_session import PlaySession
from diffaccel.cli.world import open_sampler
from diffaccel.files import write_bytes
from scripts.browser import Page, opened

WIDTH, MOST_HEIGHT = 480, 900  # of the window, in pixels
COLOURS = (256, 128, 64, 32)


def packed(png: bytes, limit: int) -> bytes:
    """Return a PNG of at most ``limit`` bytes, with as many colours as fit.

    Raises:
        ValueError: where even the fewest do not fit.
    """
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in COLOURS:
        data = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
        if data.tell() <= limit:
            return data.getvalue()
    raise ValueError(f"The picture takes {data.tell()} bytes with {COLOURS[-1]} colours; the limit is {limit}.")


async def play_on(page: Page, session: PlaySession, frames: int) -> bytes:
    """Hold the keys until ``frames`` frames were drawn, and return the page as PNG."""
    await page.until("Number(document.getElementById('fps').textContent) > 0", 120)
    await page.key("ArrowRight")
    start = session.sampler.stats.accepted
    while (drawn := session.sampler.stats.accepted - start) < frames:
        await page.key("ArrowUp", "keyDown" if drawn % 12 < 6 else "keyUp")
        await asyncio.sleep(0.05)
    await page.until("Number(document.getElementById('latency').textContent) > 0")
    await page.picture(WIDTH, MOST_HEIGHT)  # lays the page out in this width
    height = await page.value("Math.ceil(document.getElementById('keys').getBoundingClientRect().bottom) + 24")
    return await page.picture(WIDTH, min(int(height), MOST_HEIGHT))


async def take(session: PlaySession, fps: float, frames: int) -> bytes:
    """Serve the page, and return its picture."""
    from aiohttp import web
    from aiohttp.test_utils import unused_port

    host, port = "127.0.0.1", unused_port()
    runner = web.AppRunner(play.make_app(session, fps, host, port))
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    try:
        async with opened(f"http://{host}:{port}/") as page:
            return await play_on(page, session, frames)
    finally:
        await runner.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coinrun-nfd", help="a zoo name or a folder (default coinrun-nfd)")
    parser.add_argument("--start", default="0", help="as of diffaccel play (default 0)")
    parser.add_argument("--frames", type=int, default=40, help="drawn before the picture is taken (default 40)")
    parser.add_argument("--fps", type=float, default=15.0)
    parser.add_argument("--limit", type=int, default=60_000, help="most bytes of the picture (default 60000)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    session = PlaySession(*open_sampler(play.make_parser().parse([args.model, "--start", args.start])))
    session.sampler.warm_up(poll=True)
    picture = packed(asyncio.run(take(session, args.fps, args.frames)), args.limit)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(args.out, picture)
    print(f"{args.out}: {len(picture)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
