"""Weights of three networks shared out among two processes: they learn what one learns, and resume to the bit."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_toys import small_teacher
from started import in_processes

from diffaccel.distill import SIM, TSCD, Distillation
from diffaccel.distill.train import distil
from diffaccel.errors import DiffAccelError
from diffaccel.processes import Processes
from diffaccel.training.shards import whole

STEPS = 6


def options(**changes: Any) -> SIM:
    return SIM(**{"steps": STEPS, "batch": 8, "lr": 1e-3, "ema_pictures": 8, **changes})


def teacher() -> Any:
    made = small_teacher(guidance=2.0)
    made.conditions = (0.5,)  # the same for all rows
    return made


def numbers(run: Distillation) -> dict[str, torch.Tensor]:
    """Return all that a run has learnt, whole; a collective of all processes."""
    parameters = [*run.generator.parameters(), *run.assistant.parameters()]
    learnt = {str(place): whole(p.detach()).clone() for place, p in enumerate(parameters)}
    return {**learnt, **run.weights()}


def start(folder: Path, place: Processes, **changes: Any) -> Distillation:
    config = options(sequential=True, momentum=0.5, **changes)  # an optimiser of two moments, and one of one
    return Distillation(teacher(), config, folder, processes=place, sharded=place.size > 1)


def _share(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=120), rank=rank, world_size=2
    )
    place, run, broken = Processes(rank, 2), Path(folder, "run"), Path(folder, "broken")
    one = start(run, place)
    assert not hasattr(next(one.source.network.parameters()), "to_local")
    assert next(p for p in one.generator.parameters() if p.shape[0] == 16).to_local().shape[0] == 8
    assert one.run(every=3, evaluate=lambda run: run.meter())
    made = numbers(one)
    lost = start(broken, place)
    for _ in range(2):
        lost.turn()
        lost.step += 1
    lost.save()
    lost.turn()  # lost with the processes
    resumed = start(broken, place)
    assert resumed.step == 2 and resumed.run()
    again = numbers(resumed)
    assert made.keys() == again.keys() and all(torch.equal(made[key], again[key]) for key in made)
    if rank == 0:
        torch.save(made, Path(folder, "learnt.pt"))
    with pytest.raises(DiffAccelError, match=r"other options \(lr\)"):
        start(run, place, lr=2e-3)
    with pytest.raises(DiffAccelError, match="Go on with --sharded"):
        Distillation(teacher(), options(), run, processes=place)
    torch.distributed.barrier()
    if rank == 0:
        shard = sorted((run / f"checkpoint-{STEPS}").glob("*.distcp"))[0]
        data = shard.read_bytes()
        shard.write_bytes(bytes([*data[:-9], data[-9] ^ 1, *data[-8:]]))
    torch.distributed.barrier()
    with pytest.raises(DiffAccelError, match="has not the SHA-256"):
        start(run, place)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_parts_learn_what_one_learns_and_resume_to_the_bit(tmp_path: Path) -> None:
    in_processes(_share, (str(tmp_path),), 2)
    one = start(tmp_path / "one", Processes())
    assert one.run()
    shared = torch.load(tmp_path / "learnt.pt", weights_only=True)
    for key, value in numbers(one).items():
        torch.testing.assert_close(shared[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    with pytest.raises(DiffAccelError, match="Go on with --sharded"):
        start(tmp_path / "run", Processes())


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffAccelError, match="but this is one process"):
        Distillation(teacher(), options(), tmp_path, sharded=True)
    with pytest.raises(DiffAccelError, match="low rank is not shared out"):
        Distillation(teacher(), options(rank=2), tmp_path, sharded=True)
    config = TSCD(steps=4, batch=2, ema_pictures=0)
    with pytest.raises(DiffAccelError, match="which trajectories do not know"):
        distil(None, ("a",), config, tmp_path, sharded=True)
    with pytest.raises(DiffAccelError, match="--judge none"):
        distil(None, ("a",), options(), tmp_path, sharded=True, evaluate=lambda run: {})
