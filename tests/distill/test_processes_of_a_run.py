"""Two processes of one run: they stop at one step, by the clock of the first, and learn what one learns."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from distill_toys import small_teacher
from safetensors.torch import load_file
from started import in_processes

from diffaccel.distill.run import Distillation
from diffaccel.distill.sim import SIM
from diffaccel.processes import Processes
from diffaccel.training.loop import Deadline


def _run(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=30), rank=rank, world_size=2
    )
    config = SIM(steps=1_000_000, batch=4, ema_pictures=0)
    run = Distillation(small_teacher(), config, folder, processes=Processes(rank, 2))
    run.run(Deadline(1.0 if rank == 0 else 1e9))
    Path(folder, str(rank)).write_text(str(run.step), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_stop_at_one_step_whose_clock_is_the_first_ones(tmp_path: Path) -> None:
    in_processes(_run, (str(tmp_path),), 2)
    first, second = (int((tmp_path / str(rank)).read_text(encoding="utf-8")) for rank in range(2))
    assert first == second > 0


def _learn(rank: int, size: int, folder: str, calls: int) -> None:
    if size > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/store", timeout=timedelta(seconds=30), rank=rank, world_size=size
        )
    teacher = small_teacher(guidance=2.0)
    teacher.conditions = (0.5,)  # the same for all rows
    config = SIM(steps=5, student_steps=calls, batch=8, lr=1e-3, ema_pictures=8)
    run = Distillation(teacher, config, Path(folder, str(size)), processes=Processes(rank, size))
    run.run()
    if size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 2])
def test_two_processes_learn_what_one_learns(calls: int, tmp_path: Path) -> None:
    _learn(0, 1, str(tmp_path), calls)
    in_processes(_learn, (2, str(tmp_path), calls), 2)
    one, two = (load_file(tmp_path / str(size) / "checkpoint.safetensors") for size in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
