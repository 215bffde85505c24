"""A command that is forked from a server is to its caller what one in a new interpreter is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from forked_commands import forked_commands

LOOK = "import os, sys; print(__name__, sys.argv, sys.stdin.read(), os.getcwd(), sys.path[0], os.environ.get('X'))"
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def env() -> Iterator[dict[str, str]]:
    with forked_commands({"MPLBACKEND": "agg"}, imported=("json",)) as environment:
        yield environment


def both(env: dict[str, str], *words: str, **options: object) -> list[subprocess.CompletedProcess[str]]:
    served = shutil.which("python", path=env["PATH"])
    assert served is not None and served != sys.executable
    return [
        subprocess.run([program, *words], env=env, capture_output=True, text=True, check=False, **options)
        for program in (served, sys.executable)
    ]


def outcomes(runs: list[subprocess.CompletedProcess[str]]) -> list[tuple[int, str, str]]:
    return [(run.returncode, run.stdout, run.stderr.splitlines()[-1] if run.stderr else "") for run in runs]


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("-c", LOOK, "a b", "-c"), 0),
        (("-m", "look", "--help"), 0),
        (("-c", "import sys; sys.exit(3)"), 3),
        (("-c", "raise SystemExit('a word')"), 1),
        (("-c", "1 / 0"), 1),
        (("-c", "import os; os.kill(os.getpid(), 9)"), -9),
        (("look.py", "1"), 0),  # of another form: a new interpreter
    ],
)
def test_it_sees_and_tells_the_same(env, tmp_path, words, status):
    (tmp_path / "look.py").write_text(LOOK)
    served, real = outcomes(both(env, *words, input="typed", cwd=tmp_path))
    assert served == real and served[0] == status


def parent(env: dict[str, str]) -> bool:
    """Return whether a command's process is not that which was started."""
    code = "import os; print(os.getpid())"
    with subprocess.Popen([shutil.which("python", path=env["PATH"]), "-c", code], env=env, stdout=-1) as process:
        return int(process.communicate()[0]) != process.pid


def test_another_environment_takes_a_new_interpreter(env):
    assert parent(env) and parent(env | {"PWD": "/"}) and not parent(env | {"OMP_NUM_THREADS": "77"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_it(env, number):
    command = [shutil.which("python", path=env["PATH"]), "-c", SLEEP]
    with subprocess.Popen(command, env=env, stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(20) == -number
        limit = time.monotonic() + 20
        while is_alive(pid) and time.monotonic() < limit:
            time.sleep(0.01)
        assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
