"""``diffaccel play``: a world model in a page of the browser, by the keyboard."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import json
import socket
from importlib import resources
from typing import Any

from diffaccel import terminal
from diffaccel.cli.play_session import PlaySession
from diffaccel.cli.world import add_sampler_options, check_fps, open_sampler
from diffaccel.errors import DiffAccelError, first_line

_EXAMPLES = """examples:
  diffaccel play coinrun-nfd
  diffaccel play ./world --draft auto --latency 50 --port 9000

The page is served to this machine alone. --host with another address than a loopback one needs --allow-remote: who can
reach the port can then play, and nothing is encrypted."""
STATS_EVERY = 5  # frames
HTTP = 80  # the port that browsers leave out of the header
LARGEST_MESSAGE = 1024  # bytes of what a page may say
POLICY = "default-src 'self' 'unsafe-inline'; connect-src 'self'; img-src blob:; frame-ancestors 'none'"


def make_parser() -> terminal.Parser:
    """Return the parser of the command."""
    parser = terminal.Parser(prog="diffaccel play", description="Play in a world model, in a page.", epilog=_EXAMPLES)
    add_sampler_options(parser, "1")
    add = parser.add_argument
    add("--fps", type=float, default=15.0, metavar="F", help="most frames a second (default 15)")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to serve on (default 127.0.0.1)")
    add("--port", type=int, default=8765, metavar="P", help="port to serve on (default 8765)")
    add("--allow-remote", action="store_true", help="allow an address that other machines reach")
    return parser


def run(argv: list[str]) -> int:
    """Run the command until it is interrupted, and return its exit status."""
    options = make_parser().parse(argv)
    if importlib.util.find_spec("aiohttp") is None:
        raise DiffAccelError(
            "play serves its page by aiohttp, which is not installed. Install it: pip install aiohttp."
        )
    check_address(options.host, options.port, options.allow_remote)
    check_fps(options.fps)
    told = f"http://{_bracketed(options.host)}:{options.port}"
    check_free(options.host, options.port, told)
    from aiohttp import web

    session = PlaySession(*open_sampler(options))
    session.sampler.warm_up(poll=True)
    session.next_picture()  # its errors come now
    app = make_app(session, options.fps, options.host, options.port)
    try:
        web.run_app(app, host=options.host, port=options.port, print=lambda *_: terminal.write(f"{told} (Ctrl+C ends)"))
    except OSError as error:
        raise _not_served(told, error) from error
    return 0


def check_address(host: str, port: int, allow_remote: bool) -> None:
    """Raise for a port that cannot be, and for an address that other machines reach, unless that is asked for."""
    if not 1 <= port <= 65535:
        raise DiffAccelError(f"--port is {port}; it must be from 1 to 65535.")
    if not is_loopback(host) and not allow_remote:
        raise DiffAccelError(
            f"--host is '{host}', which other machines may reach. Use 127.0.0.1, or add --allow-remote."
        )


def check_free(host: str, port: int, told: str) -> None:
    """Raise for an address that cannot be served, such as a port in use, before a model is opened for it."""
    try:
        kind, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(place[:2], family=kind).close()
    except (OSError, UnicodeError) as error:
        raise _not_served(told, error) from error


def _not_served(told: str, error: Exception) -> DiffAccelError:
    return DiffAccelError(f"{told} cannot be served: {first_line(error)}. Name another --port.")


def is_loopback(host: str) -> bool:
    """Return whether an address is one that this machine alone reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def names_of(host: str, port: int) -> set[str]:
    """Return what the header Host of a browser on the page says."""
    own = {"127.0.0.1", "localhost", "::1"} if is_loopback(host) else {host}
    names = {_bracketed(name) for name in own | {host}}
    return {f"{name}:{port}" for name in names} | (names if port == HTTP else set())


def make_app(session: PlaySession, fps: float, host: str, port: int) -> Any:
    """Return the application: the page, and the socket of one player at a time.

    A request whose Host is another name is refused, and so is a socket of a page of another origin: a foreign page in
    the player's browser can neither read the pictures nor press keys.
    """
    from aiohttp import web

    names, is_open = names_of(host, port), is_loopback(host)
    page = resources.files("diffaccel.cli").joinpath("play_page.html").read_text(encoding="utf-8")
    playing, players = asyncio.Lock(), set[Any]()

    @web.middleware
    async def own_name_only(request: Any, handler: Any) -> Any:
        if is_open and request.headers.get("Host") not in names:
            raise web.HTTPForbidden(text="This page is served under its own address only.")
        return await handler(request)

    async def show(_: Any) -> Any:
        return web.Response(text=page, content_type="text/html", headers={"Content-Security-Policy": POLICY})

    async def connect(request: Any) -> Any:
        origin, own = request.headers.get("Origin"), request.headers.get("Host")
        if origin != f"http://{own}":
            raise web.HTTPForbidden(text="The socket is for the page of this server only.")
        socket = web.WebSocketResponse(max_msg_size=LARGEST_MESSAGE, heartbeat=20)
        await socket.prepare(request)
        if playing.locked():
            await socket.close(code=1013, message=b"Somebody plays already.")
            return socket
        async with playing:
            players.add(socket)
            try:
                await play(socket, session, fps)
            finally:
                players.discard(socket)
        return socket

    async def say_goodbye(_: Any) -> None:
        for player in list(players):  # else the server waits for them for a minute
            await player.close(code=1001, message=b"The server has ended.")

    app = web.Application(middlewares=[own_name_only])
    app.on_shutdown.append(say_goodbye)
    app.add_routes([web.get("/", show), web.get("/socket", connect)])
    return app


async def play(socket: Any, session: PlaySession, fps: float) -> None:
    """Send pictures until the player leaves; frames are drawn in a thread, while keys are heard."""
    from aiohttp import WSMsgType

    loop, again = asyncio.get_running_loop(), asyncio.Event()
    session.let_go()

    async def send() -> None:
        await socket.send_str(json.dumps({"world": session.describe()}))
        number, due = 0, loop.time()
        while not socket.closed:
            if again.is_set():
                again.clear()
                await asyncio.to_thread(session.begin_again)
            await socket.send_bytes(await asyncio.to_thread(session.next_picture))
            if number % STATS_EVERY == 0:
                await socket.send_str(json.dumps({"stats": session.stats()}))
            number, due = number + 1, max(due + 1 / fps, loop.time())
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def send_until_the_end() -> None:
        try:
            await send()
        except ConnectionError:
            raise
        except Exception as error:  # the page is told, and does not wait for a picture that never comes
            terminal.write_note(f"play: {first_line(error)}")
            await socket.close(code=1011, message=first_line(error).encode()[:120])

    sending = asyncio.create_task(send_until_the_end())
    try:
        async for message in socket:
            if message.type is WSMsgType.TEXT and not _obey(message.data, session, again):
                await socket.close(code=1008, message=b"That is no key of this game.")
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await sending


def _obey(text: str, session: PlaySession, again: asyncio.Event) -> bool:
    """Do what a message says; return whether it says something that can be done."""
    try:
        message = json.loads(text)
        if message.get("reset"):
            again.set()
        if "action" in message:
            session.want(message["action"])
    except (ValueError, AttributeError, RecursionError):  # a thousand open brackets
        return False
    return True
