"""Commands without the start of an interpreter: each is forked from a process that has imported the large libraries.

``python command_server.py SOCKET MODULE...`` imports the modules, listens on a Unix socket, prints ``ready``, and ends
when its stdin is closed. A client (:data:`CLIENT`, a program that takes the place of ``python`` and of the package's
console script on the path) sends it its arguments, folder, environment and first three file descriptors. The forked
process takes them over and runs the same file, module or code as ``__main__``, so that all but the imports is what a
new process does; its exit status, or the signal that ended it, becomes that of the client, and signals that reach the
client are passed on. Where the environment is another one than the server's, whose libraries have read it, or the
arguments are of another form, the client becomes the real program instead.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

UNREAD = ("PWD", "OLDPWD", "SHLVL", "_", "PYTEST_CURRENT_TEST")  # what libraries do not read of the environment
CLIENT = """\
#!{python} -IS
import json, os, signal, socket, struct, sys

program, server, pid = {program!r}, {server!r}, os.getpid()
words, environment = sys.argv[1:], dict(os.environ)
seen = {{key: value for key, value in environment.items() if key not in {unread!r}}}
is_python = os.path.basename(program).startswith("python")
if seen != {environment!r} or (is_python and words[:1] not in (["-m"], ["-c"])):
    os.execv(program, [program, *words])
connection = socket.socket(socket.AF_UNIX)
connection.connect(server)
message = json.dumps([None if is_python else program, words, os.getcwd(), environment]).encode()
socket.send_fds(connection, [struct.pack("!I", len(message))], [0, 1, 2])
connection.sendall(message)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
status = struct.unpack("!i", connection.recv(4, socket.MSG_WAITALL))[0]
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(pid, -status)
os._exit(status)
"""


def client(program: str, server: str, environment: dict[str, str], unread: tuple[str, ...] = ()) -> str:
    """Return the text of a program that has its work done by the server; ``unread`` are further names of variables."""
    unread = (*UNREAD, *unread)
    seen = {key: value for key, value in environment.items() if key not in unread}
    return CLIENT.format(python=sys.executable, program=program, server=server, environment=seen, unread=unread)


class Stop(Exception):
    """Leaves the server's loop in a forked process, with what that is to run."""

    def __init__(self, request: list[Any]) -> None:
        super().__init__()
        self.request = request


class Server:
    """Forks a process for every connection, and tells the connection how it ended."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.ended, wakes = socket.socketpair()
        wakes.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakes.fileno())
        self.wakes = wakes
        self.selector = selectors.DefaultSelector()
        for file, action in ((self.listener, self._accept), (self.ended, self._reap), (sys.stdin, None)):
            self.selector.register(file, selectors.EVENT_READ, action)
        self.running: dict[int, socket.socket] = {}

    def serve(self) -> None:
        """Answer until stdin is closed.

        Raises:
            Stop: in a forked process.
        """
        while True:
            for key, _ in self.selector.select():
                if key.data is None:
                    return
                key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        size, files, _, _ = socket.recv_fds(connection, 4, 3)
        request = json.loads(connection.recv(struct.unpack("!I", size)[0], socket.MSG_WAITALL))
        pid = os.fork()
        if pid == 0:
            self._become(files, connection)
            raise Stop(request)
        for file in files:
            os.close(file)
        self.running[pid] = connection
        self.selector.register(connection, selectors.EVENT_READ, self._pass_on)

    def _become(self, files: list[int], connection: socket.socket) -> None:
        """Take over a client's files, and close the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for end in (self.listener, self.ended, self.wakes, connection, *self.running.values()):
            end.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)

    def _pass_on(self, connection: socket.socket) -> None:
        """Send a signal that the client received, or SIGKILL when the client is no more."""
        (pid,) = (pid for pid, its in self.running.items() if its is connection)
        received = connection.recv(1)
        os.kill(pid, received[0] if received else signal.SIGKILL)
        if not received:
            self.selector.unregister(connection)

    def _reap(self, ended: socket.socket) -> None:
        ended.recv(4096)
        while self.running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self.running.pop(pid)
            if connection in self.selector.get_map():
                self.selector.unregister(connection)
                connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
            connection.close()


def run(program: str | None, words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Do what ``python WORDS`` does, or a script of the environment when ``program`` is one."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()  # the server's state is the same in all
    if program is not None:
        sys.argv[:], sys.path[0] = [program, *words], os.path.dirname(program)
        runpy.run_path(program, run_name="__main__")
        return
    kind, what, *others = words
    sys.argv[:], sys.path[0] = [kind, *others], ""
    if kind == "-m":
        sys.path[0] = folder
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), main.__dict__)


def main() -> Callable[[], None] | None:
    """Serve; in a forked process return what is left to do."""
    path, *modules = sys.argv[1:]
    for name in modules:
        module, _, attributes = name.partition(":")
        for attribute in ("__name__", *filter(None, attributes.split(","))):
            getattr(importlib.import_module(module), attribute)
    gc.collect()
    gc.freeze()  # pages of memory that no collection touches stay shared
    server = Server(path)
    print("ready", flush=True)
    try:
        server.serve()
    except Stop as stop:
        request = stop.request
        return lambda: run(*request)
    return None


if __name__ == "__main__":
    work = main()
    if work is not None:
        work()
