"""How commands end: by signals, behind a closed pipe, in a launch, and with names that hold control characters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from diffaccel import terminal
from diffaccel.errors import DiffAccelError
from diffaccel.processes import join


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


def test_a_number_of_processes_without_a_launcher_is_an_error(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(DiffAccelError, match=r"WORLD_SIZE is 4, but RANK.*Unset WORLD_SIZE"):
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
