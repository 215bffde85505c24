"""The table of emoji-flux's students: who is compared with whom, and what is kept of a call that was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.eval.features import statistics_files
from scripts import timing
from scripts.zoo.emoji_1step import table

DIM = 8


class _Judge:
    """Sees the mean colours of a picture's parts; every text says that all are bright."""

    def __init__(self, *arguments: object) -> None: ...

    def images(self, pictures: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures, (2, 2)).flatten(1)[:, :DIM]

    def texts(self, texts: list[str]) -> Tensor:
        return torch.full((len(texts), DIM), DIM**-0.5)


def test_a_student_stands_beside_its_teacher_at_equal_steps_and_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []

    def draw(pipe: Any, texts: list[str], *, steps: int, **_: object) -> Tensor:
        drawn.append(pipe)
        shared = torch.rand(len(texts), 3, 2, 2, generator=torch.Generator().manual_seed(0))
        own = torch.rand(len(texts), 3, 2, 2, generator=torch.Generator().manual_seed(len(drawn)))
        bright = 0.9 if pipe.startswith("student") else steps / 4
        return bright * (0.8 * shared + 0.2 * own).repeat_interleave(4, 2).repeat_interleave(4, 3)

    monkeypatch.setattr(table.Table, "pipe", lambda self, row, dtype: row.name)
    slower = [1 + 0.01 * turn for turn in range(8)]
    monkeypatch.setattr(table.Table, "seconds", lambda self, batch: {
        row.name: [(row.rows + 0.5) * times for times in slower] for row in [*self.teachers, *self.students]
    })  # fmt: skip
    monkeypatch.setattr(table.pictures, "Judge", _Judge)
    monkeypatch.setattr(table.pictures, "draw", draw)
    file = statistics_files.read(zoo.path(table.JUDGE) / "fd_reference_64.npz")
    moments = table.frechet_intervals.Moments.from_covariance(torch.full((DIM,), 0.5), 0.01 * torch.eye(DIM))
    monkeypatch.setattr(table.statistics_files, "read", lambda path: table.statistics_files.StatisticsFile(
        moments, *(getattr(file, name) for name in list(file.__dataclass_fields__)[1:])
    ))  # fmt: skip
    arguments = ["table", "--recipe", "tiny", "--device", "cpu", "--steps", "1", "--pictures", "40", "--batches", "1,3"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    table.main()
    told, made = capsys.readouterr().out, json.loads((tmp_path / "out" / "emoji-flux-students_cpu.json").read_text())
    assert drawn == ["teacher, 2 steps", "teacher, 1 step", "student, 1 step"] and set(made["seconds"]) == {"1", "3"}
    assert [(pair["at"], pair["a"], pair["b"]) for pair in made["pairs"]] == [
        ("equal steps", "student, 1 step", "teacher, 1 step"),
        ("equal seconds", "student, 1 step", "teacher, 1 step"),
        ("most steps", "student, 1 step", "teacher, 2 steps"),
    ]
    value, low, high = made["pairs"][0]["fd_ratio"]
    fd = {name: row["fd"][0] for name, row in made["rows"].items()}
    assert low <= value <= high and value == pytest.approx(fd["student, 1 step"] / fd["teacher, 1 step"], rel=1e-2)
    assert made["rows"]["student, 1 step"]["whole_calls"]["1"]["times"][0] == pytest.approx(4.5 / 1.5)
    assert "| equal seconds | student, 1 step | teacher, 1 step |" in told
    assert (tmp_path / "out" / "emoji-flux-students_cpu.png").stat().st_size > 1000
    table.main()
    assert len(drawn) == 3  # features were kept


def test_equal_seconds_are_those_of_the_fastest_teacher_that_is_not_faster() -> None:
    seconds = {"s": [1.0, 1.1, 9.0], "a": [1.0, 1.0, 1.0], "b": [1.2, 1.2, 1.2], "c": [3.0, 3.0, 3.0]}
    assert table.equal_seconds("s", ["c", "b", "a"], seconds) == "b"
    assert table.equal_seconds("c", ["a", "b"], seconds) == "b"  # none is as slow: the slowest


def test_a_student_that_is_nowhere_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DiffAccelError, match="job --steps 64 --work"):
        table.student_of(64, tmp_path, 0)
    assert table.student_of(1, tmp_path, 0).packed == table.export.packed_base().with_name("emoji-flux-1step")


def test_calls_take_turns_that_go_both_ways_after_one_that_warms_up() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]
    found = timing.in_turns(calls, 2, torch.device("cpu"))
    assert "".join(order) == "baabba" and {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}
