"""What holds for the whole suite: GPU tests need a GPU, and no file of the project may be loaded under two names."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("diffaccel", "samplers", "quant", "distill", "kernels", "eval", "scripts", "tests")
TWICE = pytest.StashKey[list[str]]()


def pytest_configure() -> None:
    """Ctrl-C must arrive: what a shell starts in the background ignores it, and so would the processes tested here.

    Workers of pytest-xdist share the cores, with the processes that they start. What is imported and collected is never
    garbage: looking through it again and again takes a sixth of the time of collecting.
    """
    gc.disable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # no test's collection of garbage looks at what was there before
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def loaded_twice() -> list[str]:
    """Return files of the project that are in ``sys.modules`` as more than one module object."""
    names: dict[str, dict[int, str]] = defaultdict(dict)
    folders = tuple(f"{ROOT / name}{os.sep}" for name in OURS)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and (real := os.path.realpath(file)).startswith(folders):
            names[real][id(module)] = name
    return sorted(f"{file}: {', '.join(sorted(copies.values()))}" for file, copies in names.items() if len(copies) > 1)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail when a module is loaded twice: that means two registries, and isinstance checks that fail."""
    twice = sorted({*session.config.stash.get(TWICE, []), *loaded_twice()})
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: the main process reports it
        session.config.workeroutput["loaded_twice"] = twice
    elif twice and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    session.config.stash[TWICE] = twice


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the findings of a worker of pytest-xdist in the main process."""
    twice = getattr(node, "workeroutput", {}).get("loaded_twice", [])  # a worker that crashed has no output
    node.config.stash[TWICE] = [*node.config.stash.get(TWICE, []), *twice]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(TWICE, []):
        terminalreporter.write_line(f"ERROR: one file loaded under two names: {line}", red=True)
