"""A pytest plugin that wraps every pipeline that diffusers' tests construct, and notes how each test ends.

Options come by the environment, since the tests' own pytest configuration is left alone: ``DIFFACCEL_CONFIG`` names the
method ("" for the stock pipelines), ``DIFFACCEL_RECORD`` the file of JSON lines, which also says what need not be run
again: what this kind of processor has run, since others round otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

import diffaccel
from diffaccel import record

CONFIG = os.environ.get("DIFFACCEL_CONFIG", "")
RECORD = Path(os.environ.get("DIFFACCEL_RECORD", "outcomes.jsonl"))
OUTPUTS: list[str] = []  # digests of what the pipelines of the running test returned
PATHS: list[str] = []  # what ran each of these calls
RUNNING: list[Any] = []  # pipelines whose calls have begun
ENDED: dict[str, dict[str, Any]] = {}
PROCESSOR = record.describe_device(torch.device("cpu"))["name"]


def digest(value: Any) -> str:
    """Return a digest of a pipeline's output that is equal where all of its bits are."""
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()[:16]


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        state.update(f"{value.dtype}{tuple(value.shape)}".encode())
        value = value.detach().cpu().contiguous()
        state.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, np.ndarray):
        state.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, PIL.Image.Image):
        state.update(f"{value.mode}{value.size}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            state.update(str(key).encode())
            _feed(state, value[key])
    elif isinstance(value, list | tuple):
        state.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(state, item)
    else:
        state.update(type(value).__name__.encode() if hasattr(value, "__dict__") else repr(value).encode())


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def wrap_constructors() -> None:
    """Make every pipeline class wrap its instances; classes that were seen before are left alone."""
    for cls in set(_subclasses(DiffusionPipeline)):
        init = vars(cls).get("__init__")
        if init is not None and not hasattr(init, "is_wrapping"):
            cls.__init__ = _wrapping(init)


def _wrapping(init: Any) -> Any:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        depth = self.__dict__.get("_wrapping_depth", 0)
        object.__setattr__(self, "_wrapping_depth", depth + 1)
        init(self, *args, **kwargs)
        if depth:
            self.__dict__["_wrapping_depth"] = depth
            return
        del self.__dict__["_wrapping_depth"]
        if CONFIG:
            diffaccel.accelerate(self, CONFIG)
        _note_outputs(self)

    __init__.is_wrapping = True  # type: ignore[attr-defined]
    return __init__


def _note_outputs(pipe: Any) -> None:
    """Note what the pipeline's calls return, whatever runs them."""
    cls = type(pipe)

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        RUNNING.append(self)
        try:
            result = cls.__call__(self, *args, **kwargs)
        finally:
            RUNNING.pop()
        if RUNNING:  # called by another pipeline, also while that is watched
            return result
        OUTPUTS.append(digest(result))
        last = diffaccel.summary(self).last_run if CONFIG else None
        PATHS.append(last["path"] if last else "stock")
        return result

    members = {"__call__": __call__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    object.__setattr__(pipe, "__class__", type(cls.__name__, (cls,), members))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    rows = map(json.loads, lines)
    done = {row["test"] for row in rows if row.get("processor") == PROCESSOR}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    wrap_constructors()
    OUTPUTS.clear()
    PATHS.clear()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    start = time.perf_counter()
    result = yield
    row = ENDED.pop(item.nodeid, {"outcome": "nothing"})
    seconds = round(time.perf_counter() - start, 2)
    row = {"test": item.nodeid, **row, "seconds": seconds, "outputs": list(OUTPUTS), "paths": list(PATHS)}
    row["processor"] = PROCESSOR
    with RECORD.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    row = ENDED.setdefault(report.nodeid, {"outcome": "passed"})
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        row.update(outcome="failed", when=report.when, message=" ".join(message.split())[:400])
    elif report.skipped and row["outcome"] == "passed":
        row["outcome"] = "skipped"
