"""Students whose change of every matrix has a low rank: what learns, what is exported, what resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from distill_toys import Velocity, small_teacher

from diffaccel.distill.learner import learner
from diffaccel.distill.low_rank import begin_as, restrict
from diffaccel.distill.run import Distillation
from diffaccel.distill.sim import SIM
from diffaccel.distill.student import student
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.errors import DiffAccelError

RANK = 3
SMALL = SIM(steps=4, batch=8, lr=1e-2, ema_pictures=8, rank=RANK)


def matrices(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {str(i): layer.weight.detach() for i, layer in enumerate(network.layers) if hasattr(layer, "weight")}  # type: ignore[union-attr, arg-type]


def test_a_restricted_network_begins_as_it_was_and_learns_changes_of_its_rank(tmp_path: Path) -> None:
    run = Distillation(small_teacher(), SMALL, tmp_path)
    before, after = matrices(run.teacher.network), matrices(run.generator)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run.run()
    after = matrices(run.generator)
    ranks = {name: int(torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5)) for name in before}
    assert 0 < ranks["2"] <= RANK  # 16 x 16; the others have a side of 3 or less and learn as a whole
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(run.teacher.network.layers[2].bias, run.generator.layers[2].bias)  # type: ignore[index]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), matrices(run.teacher.network).values(), strict=True))
    free = torch.linalg.matrix_rank(run.assistant.layers[2].weight - before["2"], atol=1e-5)  # type: ignore[index]
    assert int(free) > RANK


def test_a_run_goes_on_from_a_student_of_its_rank_as_a_change_of_the_teacher(tmp_path: Path) -> None:
    first = Distillation(small_teacher(), SMALL, tmp_path / "first")
    assert first.run()
    begin = learner(first.teacher.network)
    begin.load_state_dict({**begin.state_dict(), **first.weights()})
    run = Distillation(small_teacher(), SMALL, tmp_path / "second", begin=begin)
    for name, weight in run.weights().items():
        torch.testing.assert_close(weight, first.weights()[name], rtol=1e-5, atol=1e-5)
    teacher = matrices(run.teacher.network)["2"]
    far = learner(first.teacher.network)
    far.layers[2].weight.data += 1.0 + torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    near = begin_as(restrict(learner(first.teacher.network), RANK, 0), far)
    u, s, v = torch.linalg.svd(matrices(far)["2"] - teacher)
    expected = teacher + (u[:, :RANK] * s[:RANK]) @ v[:RANK]
    torch.testing.assert_close(near.layers[2].weight, expected, rtol=1e-4, atol=1e-4)
    assert run.run()
    assert int(torch.linalg.matrix_rank(matrices(run.generator)["2"] - teacher, atol=1e-5)) <= RANK
    with pytest.raises(DiffAccelError, match="began with another network"):
        Distillation(small_teacher(), SMALL, tmp_path / "second")


def test_a_rank_that_no_matrix_has_is_refused() -> None:
    with pytest.raises(DiffAccelError, match="no matrix of Velocity is larger"):
        restrict(Velocity(), 16, 0)
    with pytest.raises(DiffAccelError, match="rank is -1"):
        SIM(rank=-1)


def test_a_killed_run_of_low_rank_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, broken = (Distillation(small_teacher(), SMALL, tmp_path / name) for name in ("whole", "broken"))
    assert whole.run()
    broken.turn()
    broken.step += 1
    broken.save()
    with pytest.raises(DiffAccelError, match="other options \\(rank\\)"):
        Distillation(small_teacher(), SIM(steps=4, batch=8, lr=1e-2, ema_pictures=8), tmp_path / "broken")
    resumed = Distillation(small_teacher(), SMALL, tmp_path / "broken")
    assert resumed.run()
    ours, theirs = matrices(resumed.generator), matrices(whole.generator)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(a, b) for a, b in zip(resumed.average.shadow, whole.average.shadow, strict=True))


def test_its_pipeline_has_plain_weights_under_their_own_names_and_the_run_stays(tmp_path: Path) -> None:
    call = dict(tiny.call_kwargs("flux"))
    for name in ("prompt", "generator", "negative_prompt"):
        call.pop(name, None)
    pipe = tiny.make("flux")
    config = SIM(steps=2, batch=2, lr=1e-2, ema_pictures=0, rank=2)
    run = Distillation(PipelineTeacher(pipe, ("a", "b"), 2, call), config, tmp_path)
    assert run.run()
    first, second = student(run).transformer, student(run).transformer
    own = dict(pipe.transformer.named_parameters())
    assert dict(first.named_parameters()).keys() == own.keys()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    changes = {key: (p - own[key]).detach().flatten(1) for key, p in first.named_parameters() if p.ndim > 1}
    ranks = {key: int(torch.linalg.matrix_rank(change, atol=1e-5)) for key, change in changes.items()}
    assert max(ranks.values()) == 2 and sum(rank > 0 for rank in ranks.values()) > len(ranks) / 2
    first.save_pretrained(tmp_path / "saved")
