"""How commands end: by signals, behind a closed pipe, in a launch, and with names that hold control characters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from diffaccel import cli, terminal
from diffaccel.errors import DiffAccelError
from diffaccel.processes import join


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_run_as_ctrl_c_does(sample, monkeypatch, tmp_path, name):
    import diffaccel.runs.generate as generate

    number, draw, calls = getattr(signal, name), generate.generate_chunk, []

    def draw_until_the_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return draw(*arguments, **options)

    before = signal.signal(number, signal.SIG_DFL)
    try:
        monkeypatch.setattr(generate, "generate_chunk", draw_until_the_second)
        done = sample("a cat", "--num", 3, "--out", "run")
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # as under nohup
        calls.clear()
        assert sample("a cat", "--num", 3, "--out", "run", "--json").status == 0
    finally:
        signal.signal(number, before)
    assert done.status == 128 + number and "Stopped. Finished images stay" in done.err and done.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "diffaccel", "list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_process_of_a_launch_tells_its_error(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("explain", "heum").err.startswith("diffaccel: process 1 of the launch: error: Unknown method")


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_process_of_a_launch_that_waits_ends_with_a_sentence(name):
    """Python runs no handler while the main thread is inside a library, as in a collective of torch."""
    code = (
        "import hashlib, sys, threading; from diffaccel import cli; from diffaccel.cli import signals\n"
        "signals.GRACE_SECONDS = 0.2\n"
        "cli.COMMANDS['wait'] = ('hashlib:wait', '')\n"
        "hashlib.wait = lambda argv: hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
        "threading.Timer(0.3, print, ['ready'], {'flush': True}).start()\n"
        "sys.exit(cli.main(['wait']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"RANK": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    number = getattr(signal, name)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert process.stderr.read() == (
        f"diffaccel: process 1 of the launch: Stopped by {name} while waiting for the other processes.\n"
    )


def test_a_process_of_a_launch_that_computes_ends_as_others_do(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(cli.COMMANDS, "wait", ("time:sleep", ""))
    monkeypatch.setattr("time.sleep", lambda argv: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        done = run("wait")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (done.status, done.err) == (143, "diffaccel: process 1 of the launch: Stopped.\n")
    assert signal.set_wakeup_fd(-1) == -1


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": None, "LOCAL_RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None},
         r"WORLD_SIZE is 4, but RANK, .*Unset WORLD_SIZE,"),
        ({"LOCAL_RANK": None}, r"WORLD_SIZE is 4, but LOCAL_RANK, .*Unset WORLD_SIZE RANK MASTER_ADDR MASTER_PORT,"),
        ({"WORLD_SIZE": "four"}, r"WORLD_SIZE is 'four'; .* whole number"),
        ({"MASTER_PORT": "http"}, r"MASTER_PORT is 'http'; .* whole number"),
        ({"RANK": "4"}, r"RANK is 4, but WORLD_SIZE is 4"),
        ({"RANK": "0"}, r"one of 4 processes \(RANK=0, .*others did not come within 0.2 s .*: unset RANK WORLD_SIZE"),
    ],
)  # fmt: skip
def test_variables_of_a_launch_that_nobody_started(monkeypatch, variables, message):
    for name, value in (LAUNCHED | variables).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("diffaccel.processes.MEETING_SECONDS", 0.2)
    with pytest.raises(DiffAccelError, match=message):
        join(torch.device("cpu"))


def test_control_characters_are_shown_and_not_obeyed(run, capsys):
    name = "\x1b[2J\x9b1m\ud800\u202e"
    done = run("explain", name)
    assert r"\x1b[2J\x9b1m\ud800\u202e" in done.err and not set(name[:1] + "\x9b\ud800\u202e") & set(done.err)
    terminal.write_table(name, ["column"], [[name]])
    terminal.write("ä\tb\nc")
    terminal.write_json({"name": name})
    table, _, lines = capsys.readouterr().out.rpartition("ä\tb\nc\n")
    assert r"\x1b[2J" in table and "\x1b" not in table + lines
    assert json.loads(lines) == {"name": name}


def test_a_closed_output_is_no_failure_and_a_closed_input_is_empty(tmp_path):
    """As services start programs; what is opened first must not become the output either."""
    script = (
        "import os, sys; os.close(0); os.close(1); sys.stdin = sys.stdout = None\n"
        "from diffaccel.cli import main\n"
        "assert main(['list']) == 0 and os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev\n"
        "assert sys.stdin.buffer.read() == b'' and os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) > 2\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
