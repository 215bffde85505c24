"""``diffaccel play``: the page and its socket, for its own origin alone; keys change what is drawn."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from PIL import Image

from diffaccel.cli.play import check_address, is_loopback, make_app, names_of
from diffaccel.cli.play_session import PlaySession
from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.beginnings import Beginning
from diffaccel.samplers import NextFrameSampler
from tests.support.worlds import tiny_world

needs_aiohttp = pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="aiohttp is not installed")


def session(**options: Any) -> PlaySession:
    sampler = NextFrameSampler(tiny_world(torch.float32, **options), 1, draft=1)
    sampler.reset()
    return PlaySession(sampler)


def serve(check: Callable[[Any, int], Awaitable[None]], game: PlaySession | None = None) -> None:
    """Run a check against a server on a free port of this machine."""
    from aiohttp import ClientSession, web
    from aiohttp.test_utils import unused_port

    async def main() -> None:
        port = unused_port()
        runner = web.AppRunner(make_app(game or session(), 1000.0, "127.0.0.1", port))
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            async with ClientSession(f"http://127.0.0.1:{port}") as client:
                await asyncio.wait_for(check(client, port), 30)
        finally:
            await runner.cleanup()

    asyncio.run(main())


def origin(port: int) -> dict[str, str]:
    return {"Origin": f"http://127.0.0.1:{port}"}


@needs_aiohttp
def test_a_player_gets_pictures_and_presses_keys():
    game = session()

    async def check(client: Any, port: int) -> None:
        page = await (await client.get("/")).text()
        assert "<canvas" in page and "/socket" in page
        async with client.ws_connect("/socket", headers=origin(port)) as socket:
            world = (await socket.receive_json())["world"]
            assert world == {"width": 8, "height": 8, "actions": 4, "rest": 0, "arrows": False}
            with Image.open(io.BytesIO(await socket.receive_bytes())) as picture:
                assert picture.size == (8, 8)
            stats = (await socket.receive_json())["stats"]
            assert stats["action"] == 0 and stats["latency"] is None
            await socket.send_str(json.dumps({"action": 3}))
            for _ in range(200):
                message = await socket.receive()
                if isinstance(message.data, str) and (stats := json.loads(message.data)["stats"])["latency"]:
                    break
            assert stats["action"] == 3 and stats["latency"] > 0 and stats["accepted"] > 1
            before = game.sampler.stats.accepted
            await socket.send_str(json.dumps({"reset": True}))
            for _ in range(50):
                await socket.receive()
            assert game.sampler.stats.accepted < before + 50
            async with client.ws_connect("/socket", headers=origin(port)) as other:
                assert (await other.receive()).data == 1013  # somebody plays
            await socket.send_str(json.dumps({"action": 9}))
            for _ in range(200):
                if (message := await socket.receive()).data == 1008:
                    break
            assert message.data == 1008

    serve(check, game)


@needs_aiohttp
@pytest.mark.parametrize("given", ["http://evil.example", "null", None, "https://127.0.0.1", "http://127.0.0.1:1"])
def test_a_page_of_another_origin_cannot_open_the_socket(given):
    from aiohttp import WSServerHandshakeError

    async def check(client: Any, port: int) -> None:
        with pytest.raises(WSServerHandshakeError) as refused:
            await client.ws_connect("/socket", headers={} if given is None else {"Origin": given})
        assert refused.value.status == 403

    serve(check)


@needs_aiohttp
def test_another_name_of_the_server_is_refused():
    """A foreign name that is made to point to this machine is not the page's own."""

    async def check(client: Any, port: int) -> None:
        for path in ("/", "/socket"):
            name = f"evil.example:{port}"
            answer = await client.get(path, headers={"Host": name, "Origin": f"http://{name}"})
            assert answer.status == 403
        assert (await client.get("/", headers={"Host": f"localhost:{port}"})).status == 200

    serve(check)


def test_addresses():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and is_loopback("127.8.0.1")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("example.org")
    names = {"127.0.0.1", "localhost", "[::1]"}
    assert names_of("127.0.0.1", 81) == {f"{name}:81" for name in names}
    assert names_of("127.0.0.1", 80) == {f"{name}:80" for name in names} | names  # browsers leave this port out
    check_address("0.0.0.0", 80, True)
    for host, port, sentence in (("0.0.0.0", 80, "--allow-remote"), ("127.0.0.1", 0, "--port is 0")):
        with pytest.raises(DiffAccelError, match=sentence):
            check_address(host, port, False)


def test_the_arrows_of_nine_actions():
    game = session(num_actions=9)
    assert game.describe()["arrows"] and game.action == 4
    for action in (9, -1, True, "1", None):
        with pytest.raises(DiffAccelError, match="from 0 to 8"):
            game.want(action)


def test_the_command_names_what_is_missing(run, tmp_path, monkeypatch):
    tiny_world(torch.float32).save_pretrained(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run("play", tmp_path)
    assert done.status == 2 and "pip install aiohttp" in done.err


@needs_aiohttp
def test_the_command_refuses_an_open_address_before_any_work(run, tmp_path):
    done = run("play", tmp_path, "--host", "0.0.0.0")
    assert done.status == 2 and "--allow-remote" in done.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("play", tmp_path, "--port", port)
        assert done.status == 2 and f"http://127.0.0.1:{port} cannot be served" in done.err
    assert "neither model_index.json" in run("play", tmp_path, "--port", port).err
    assert "--fps is 1e-09; it must be from 0.01" in run("play", tmp_path, "--fps", "1e-9").err


@needs_aiohttp
def test_an_error_while_drawing_ends_the_game_with_its_words(monkeypatch):
    game = session()

    def fail() -> bytes:
        raise RuntimeError("the device is full")

    monkeypatch.setattr(game, "next_picture", fail)

    async def check(client: Any, port: int) -> None:
        async with client.ws_connect("/socket", headers=origin(port)) as socket:
            async for _ in socket:
                pass
            assert socket.close_code == 1011

    serve(check, game)


@needs_aiohttp
@pytest.mark.parametrize("text", ["[" * 1020, "[]", "no key", '{"action": 1e999}', '{"action": [1]}', "null"])
def test_what_is_no_key_ends_the_game_and_not_the_server(text):
    game = session()

    async def check(client: Any, port: int) -> None:
        for _ in range(2):
            async with client.ws_connect("/socket", headers=origin(port)) as socket:
                await socket.receive_json()
                await socket.send_str(text)
                async for _ in socket:
                    pass
                assert socket.close_code == 1008

    serve(check, game)


@needs_aiohttp
def test_the_next_player_finds_no_key_held_and_waits_for_a_picture_that_is_being_drawn(monkeypatch):
    game = session()
    step, drawing, most = game.sampler.step, [0], []

    def slow(*args: Any, **options: Any) -> Any:
        drawing[0] += 1
        most.append(drawing[0])
        time.sleep(0.02)
        frame = step(*args, **options)
        drawing[0] -= 1
        return frame

    monkeypatch.setattr(game.sampler, "step", slow)

    async def check(client: Any, port: int) -> None:
        for _ in range(3):
            async with client.ws_connect("/socket", headers=origin(port)) as socket:
                await socket.receive_json()
                assert game.action == 0
                await socket.receive_bytes()
                await socket.send_str(json.dumps({"action": 3}))
                while game.action != 3:
                    await socket.receive()

    serve(check, game)
    assert max(most) == 1


@needs_aiohttp
def test_a_server_that_ends_says_goodbye_and_lets_no_page_frame_it():
    from aiohttp import ClientSession, web
    from aiohttp.test_utils import unused_port

    async def main() -> int | None:
        port = unused_port()
        runner = web.AppRunner(make_app(session(), 1000.0, "127.0.0.1", port))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        async with ClientSession(f"http://127.0.0.1:{port}") as client:
            assert "frame-ancestors 'none'" in (await client.get("/")).headers["Content-Security-Policy"]
            async with client.ws_connect("/socket", headers=origin(port)) as socket:
                await socket.receive_json()
                ending = asyncio.create_task(runner.cleanup())
                async for _ in socket:
                    pass
                await asyncio.wait_for(ending, 30)  # the server's own patience is a minute
                return socket.close_code

    assert asyncio.run(main()) == 1001


def test_a_game_begins_again_with_its_own_first_frame():
    sampler = NextFrameSampler(tiny_world(torch.float32), 1, draft=1)
    start = torch.full((1, *sampler.model.frame_shape), 0.5)
    sampler.reset(start)
    game = PlaySession(sampler, Beginning(start))
    first = game.next_picture()
    game.next_picture()
    game.begin_again()
    assert game.next_picture() == first
