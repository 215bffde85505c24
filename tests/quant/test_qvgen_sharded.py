"""Sharded quantization-aware training on two processes: numbers of the whole run, and a resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import qvgen_bed
import torch
from started import in_processes

from diffaccel.errors import DiffAccelError
from diffaccel.processes import Processes
from diffaccel.quant import QVGen
from diffaccel.quant.qvgen.run import QATRun
from diffaccel.quant.qvgen.sharded import ShardedQATRun
from diffaccel.training.loop import Deadline

STEPS = 4
CONFIG = QVGen(weight_bits=4, act_bits=4, rank=2, steps=STEPS, batch=4, groups=4, lr=1e-3, save_seconds=1e9)


class Launch(Processes):
    """Processes that nobody launched."""

    def wait(self) -> None:
        torch.distributed.barrier()


def made(kind: type[QATRun], folder: Path, launch: Processes) -> QATRun:
    return kind(qvgen_bed.teacher(qvgen_bed.network(heads=2)), qvgen_bed.samples(16), CONFIG, folder, processes=launch)


def weights(run: QATRun) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.whole().named_parameters()}


def train(rank: int, folder: str) -> None:
    """Train in one go, in two, and whole."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    launch, place = Launch(rank, 2), Path(folder)
    run = made(ShardedQATRun, place / "once", launch)
    held = sum(p.to_local().numel() for p in run.student.parameters() if hasattr(p, "to_local"))
    full = sum(p.numel() for p in run.student.parameters() if hasattr(p, "to_local"))
    assert run.run() and run.student.blocks[0].ffn.net[2].rank == 0
    first = made(ShardedQATRun, place / "twice", launch)
    assert not first.run(Deadline(0)) and first.step == 0
    for _ in range(3):  # over a cut of the side branch
        first.turn()
    first.save()
    second = made(ShardedQATRun, place / "twice", launch)
    assert second.step == 3 and second.run()
    with_others = made(QATRun, place / "whole", launch)
    with_others.run()
    results: dict[str, Any] = {"once": weights(run), "twice": weights(second), "whole": weights(with_others)}
    codes = run.result()
    if rank == 0:
        torch.save({**results, "share": held / full, "codes": len(codes.state_dict())}, place / "results.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_weights_and_resume_to_the_bit(tmp_path: Path) -> None:
    in_processes(train, (str(tmp_path),), 2)
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    once, twice, whole = found["once"], found["twice"], found["whole"]
    assert once.keys() == twice.keys() == whole.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    for name, p in whole.items():
        torch.testing.assert_close(once[name], p, rtol=1e-3, atol=1e-4, msg=name)
    assert 0.45 < found["share"] < 0.55 and found["codes"] > 0


def test_a_sharded_run_needs_a_launch(tmp_path: Path) -> None:
    with pytest.raises(DiffAccelError, match="accelerate launch"):
        made(ShardedQATRun, tmp_path, Processes())
