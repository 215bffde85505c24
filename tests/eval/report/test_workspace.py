"""What a report keeps while it is made, what it says meanwhile, and why a way could not be drawn."""

from __future__ import annotations

import errno
import time
from types import SimpleNamespace

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.report import workspace as rooms
from diffaccel.eval.report.heartbeat import heartbeat
from diffaccel.eval.report.plan import ReportPlan
from diffaccel.eval.report.workspace import UnfinishedMeasurement, Workspace
from diffaccel.runs.folder import RunFailed
from diffaccel.runs.request import Request
from diffaccel.runs.variant import parse
from diffaccel.samplers import BoN


@pytest.fixture
def workspace(tmp_path):
    plan = ReportPlan(request=Request(prompts=("a", "b")), baseline=parse("plain"), everything=True)
    said = []
    made = Workspace(plan, tmp_path, said.append)
    made.said = said
    return made


def failing(error, cause):
    def generate(request, path):
        raise error from cause

    return generate


@pytest.mark.parametrize(
    ("error", "cause", "why"),
    [
        (
            RunFailed("TypeError while generating: x. Kept."),
            TypeError("no such argument"),
            "TypeError: no such argument",
        ),
        (DiffAccelError("It needs a plan."), None, "It needs a plan."),
        (DiffAccelError("It cannot be written."), OSError(errno.EACCES, "Permission denied"), "It cannot be written."),
    ],
)
def test_a_drawing_that_fails_is_a_reason(workspace, monkeypatch, error, cause, why):
    monkeypatch.setattr(rooms, "generate_run", failing(error, cause))
    assert workspace.try_to_draw(parse("euler")) == why


@pytest.mark.parametrize("kind", [RunFailed, DiffAccelError])
def test_a_full_disk_is_no_reason_of_a_way(workspace, monkeypatch, kind):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(rooms, "generate_run", failing(kind("The disk is full."), full))
    with pytest.raises(kind, match="The disk is full"):
        workspace.try_to_draw(parse("euler"))


def test_a_search_says_about_how_long_it_takes(workspace, monkeypatch):
    drawn = SimpleNamespace(record={"cost": {"seconds": 8.0, "nfe": 16}})
    monkeypatch.setattr(rooms, "generate_run", lambda request, path: None)
    monkeypatch.setattr(rooms, "open_run", lambda path: drawn)
    workspace.draw(parse("plain"))
    workspace.draw(rooms.Variant((BoN(budget=60),), {}))
    assert workspace.said[0] == "plain: 2 pictures" and workspace.said[1].endswith(": 2 pictures, about 60 s")


def test_a_part_counts_under_its_own_conditions_alone(tmp_path):
    part = UnfinishedMeasurement(tmp_path / "timing.json.part", {"turns": 3, "ways": ("a", "b")})
    assert part.read() is None
    part.keep({"turns": 1, "calls": {}})
    assert part.read() == {"turns": 1, "calls": {}}
    assert UnfinishedMeasurement(part.path, {"turns": 4, "ways": ("a", "b")}).read() is None
    part.path.write_text("{")
    assert part.read() is None
    part.remove()
    part.remove()
    assert not part.path.exists()


def test_what_takes_long_says_so_until_it_ends():
    said = []
    with heartbeat("rbf", said.append, every=0.01):
        time.sleep(0.1)
    count = len(said)
    time.sleep(0.05)
    assert count == len(said) >= 1 and said[0] == "  rbf: 0 s so far"
