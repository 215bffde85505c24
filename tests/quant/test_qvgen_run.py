"""Runs of quantization-aware training: resuming, plain LSQ+, moments, data, processes, errors."""

from __future__ import annotations

import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import qvgen_bed
import tiny
import torch
from started import in_processes
from torch import Tensor, nn

from diffaccel.distill import PipelineTeacher
from diffaccel.errors import DiffAccelError
from diffaccel.processes import Processes
from diffaccel.quant import QVGen, prepare_qat
from diffaccel.quant.qvgen.data import CleanSamples, drawn_samples, encoded_pictures, read_samples
from diffaccel.quant.qvgen.draws import NoisyBatch
from diffaccel.quant.qvgen.optimizer import QATOptimizer, rate_share
from diffaccel.quant.qvgen.prepare import fake_layers
from diffaccel.quant.qvgen.run import QATRun
from diffaccel.training.loop import Deadline, step_seed

SMALL = QVGen(rank=4, steps=6, batch=2, groups=5, lr=1e-3, clip_lr=1e-2, layers="all", save_seconds=1e9)
DATA = qvgen_bed.samples(8)


def network(seed: int = 0) -> Any:
    return qvgen_bed.network(seed, heads=2, layers=1)


def make(folder: Path, config: QVGen = SMALL, **options: Any) -> QATRun:
    return QATRun(qvgen_bed.teacher(network()), DATA, config, folder, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> QATRun:
    run = make(tmp_path_factory.mktemp("whole"))
    assert run.run()
    return run


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("made", (1, 2, 3, 5))
def test_a_killed_run_goes_on_to_the_same_bits(made: int, whole: QATRun, tmp_path: Path) -> None:
    """Killed inside of phases, at their ends, and after the side branch is gone."""
    broken = make(tmp_path / "broken")
    for _ in range(made):
        broken.turn()
    broken.save()
    broken.turn()  # lost with the process
    resumed = make(tmp_path / "broken")
    assert resumed.step == made and resumed.run()
    assert same(weights(resumed.student), weights(whole.student))
    moments = [
        {
            name: run.optimizer.adam.state[p]["exp_avg_sq"]
            for name, p in run.student.named_parameters()
            if p.requires_grad
        }
        for run in (whole, resumed)
    ]
    assert same(*moments)
    assert make(tmp_path / "broken").finished


def test_the_side_branch_leaves_the_network_the_optimiser_and_the_file(tmp_path: Path) -> None:
    run = make(tmp_path)
    sides = [p for name, p in run.student.named_parameters() if "side_" in name]
    held = {id(p) for group in run.optimizer.adam.param_groups for p in group["params"]}
    assert sides and all(id(p) in held for p in sides)
    for _ in range(3):
        run.turn()  # the third step begins a phase: rank 2, with empty moments
    changed = [p for name, p in run.student.named_parameters() if "side_left" in name]
    assert {p.shape[1] for p in changed} == {2}
    assert all(float(run.optimizer.adam.state[p]["step"]) == 1 for p in changed)
    assert not any(p in run.optimizer.adam.state for p in sides)
    run.run()
    assert not [name for name, _ in run.student.named_parameters() if "side_" in name]
    assert next(g for g in run.optimizer.adam.param_groups if g["name"] == "side")["params"] == []
    assert not [key for key in run.result().state_dict() if "side_" in key]


@pytest.mark.slow
def test_without_a_side_branch_it_is_plain_lsq(tmp_path: Path) -> None:
    """The same draws, losses and AdamW, written out."""
    config = replace(SMALL, rank=0)
    run = make(tmp_path, config)
    run.run()
    net = prepare_qat(copy.deepcopy(run.model.network).float().eval().requires_grad_(True), config)
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "scales": [], "clip": []}
    for name, p in net.named_parameters():
        last = name.rpartition(".")[2]
        kind = {"weight_scale": "scales", "weight_zero": "scales", "act_logit": "clip"}.get(last)
        groups[kind or ("matrices" if p.dim() >= 2 else "vectors")].append(p)
    peaks = {"matrices": config.lr, "vectors": config.lr, "scales": config.scale_lr, "clip": config.clip_lr}
    adam = torch.optim.AdamW(
        [{"params": group, "weight_decay": config.weight_decay if name == "matrices" else 0.0, "name": name}
         for name, group in groups.items()], betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    draws = torch.Generator()
    for step in range(config.steps):
        batch = NoisyBatch.new(run.model, DATA, config, draws.manual_seed(step_seed(0, step)), torch.device("cpu"))
        a, s = run.model.coefficients(batch.sigma)
        x = a * batch.x0 + s * batch.eps
        with torch.no_grad():
            followed = qvgen_bed.call(run.model.network, x, batch.sigma, None)
        loss = (qvgen_bed.call(net, x, batch.sigma, None) - followed).square().flatten(1).mean(1).mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups.values() for p in group if p.grad is not None], 1.0)
        for group in adam.param_groups:
            group["lr"] = peaks[group["name"]] * rate_share(step, config)
        adam.step()
    assert same(weights(net), weights(run.student))


@pytest.mark.slow
def test_a_recipe_whose_teacher_has_every_share_is_distillation(tmp_path: Path, monkeypatch: Any) -> None:
    config = replace(SMALL, recipe="dsa", rank=0)
    monkeypatch.setattr("diffaccel.quant.qvgen.run.teacher_share", lambda u, alpha: torch.ones_like(u))
    mixed, plain = make(tmp_path / "a", config), make(tmp_path / "b", replace(SMALL, rank=0))
    mixed.run()
    plain.run()
    assert same(weights(mixed.student), weights(plain.student))


def test_the_second_recipe_follows_the_data(tmp_path: Path) -> None:
    run = make(tmp_path, replace(SMALL, recipe="dsa", symmetric=True, rank=0))
    zeros = [layer.weight_zero for _, layer in fake_layers(run.student)]
    assert run.run() and all(not z.requires_grad and (z == 8).all() for z in zeros)


@pytest.mark.slow
def test_a_deadline_stops_a_run_and_the_teacher_stays(tmp_path: Path) -> None:
    run = make(tmp_path)
    before = weights(run.model.network)
    assert not run.run(Deadline(0)) and run.step == 0 and make(tmp_path).run()
    assert same(before, weights(run.model.network)) and all(p.grad is None for p in run.model.network.parameters())


@pytest.mark.slow
def test_memory_is_saved_without_a_change(tmp_path: Path) -> None:
    losses = []
    for flag in (False, True):
        run = make(tmp_path / str(flag), replace(SMALL, checkpointing=flag, rank=0))
        run.run()
        losses.append(run.fixed_loss(1))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(DiffAccelError, match="no gradient checkpointing"):
        from distill_toys import small_teacher

        QATRun(
            small_teacher(),
            CleanSamples(torch.zeros(2, 2), ("", "")),
            replace(SMALL, checkpointing=True, rank=0, skip=("layers.0",)),
            tmp_path,
        )


@pytest.mark.slow
def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.turn()
    run.save()
    with pytest.raises(DiffAccelError, match=r"other options \(lr\)"):
        make(tmp_path, replace(SMALL, lr=2e-3))
    with pytest.raises(DiffAccelError, match="another model"):
        QATRun(qvgen_bed.teacher(network(7)), DATA, SMALL, tmp_path)
    with pytest.raises(DiffAccelError, match="other data"):
        QATRun(run.model, qvgen_bed.samples(8, seed=9), SMALL, tmp_path)
    run.checkpoint.write_bytes(b"no tensors")
    with pytest.raises(DiffAccelError, match="no whole checkpoint"):
        make(tmp_path)


def test_gradients_that_are_not_finite_end_a_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("diffaccel.quant.qvgen.run.BAD_STEPS", 4)
    run = make(tmp_path, replace(SMALL, rank=0, steps=200, log_seconds=0.0))
    run.turn()
    run.save()
    good = run.checkpoint.read_bytes()
    with torch.no_grad():
        next(fake_layers(run.student))[1].weight.fill_(float("nan"))
    with pytest.raises(DiffAccelError, match="gradients were not finite"):
        run.run()
    assert run.checkpoint.read_bytes() == good


def test_errors_before_any_step(tmp_path: Path) -> None:
    with pytest.raises(DiffAccelError, match="cannot be shared by 3"):
        make(tmp_path, processes=Processes(0, 3))
    with pytest.raises(DiffAccelError, match="but the model draws"):
        QATRun(qvgen_bed.teacher(network()), CleanSamples(torch.zeros(2, 4, 8, 8), ("", "")), SMALL, tmp_path)
    with pytest.raises(DiffAccelError, match="not-a-numbers"):
        CleanSamples(torch.full((1, 2), float("nan")), ("",))
    with pytest.raises(DiffAccelError, match="2 samples and 1 prompts"):
        CleanSamples(torch.zeros(2, 2), ("",))


def test_processes_draw_the_parts_of_one_batch() -> None:
    model, config = qvgen_bed.teacher(network()), replace(SMALL, batch=4)
    parts = [
        NoisyBatch.new(model, DATA, config, torch.Generator().manual_seed(4), torch.device("cpu"), share)
        for share in ((0, 1), (0, 2), (1, 2))
    ]
    for name in ("eps", "sigma"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts[1:]]), getattr(parts[0], name))
    assert torch.equal(torch.cat([p.x0 for p in parts[1:]]), parts[0].x0)


def _in_a_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    run = make(Path(folder), processes=Processes(rank, 2))
    run.run()
    torch.save(weights(run.student), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    in_processes(_in_a_process, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first, second)
    alone = make(tmp_path / "alone")
    alone.run()
    for name, p in weights(alone.student).items():
        assert float((p - first[name]).norm()) <= 0.02 * float(p.norm()) + 1e-3, name


def _sharded(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    with pytest.raises(DiffAccelError, match="is sharded"):
        prepare_qat(fully_shard(network(), mesh=mesh), SMALL)
    Path(folder, "done").touch()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_network_is_refused_by_name(tmp_path: Path) -> None:
    in_processes(_sharded, (str(tmp_path),), 1)
    assert (tmp_path / "done").exists()


# -- pipelines and data -----------------------------------------------------------------------------------------------

CALL = {"height": 32, "width": 32, "max_sequence_length": 24, "true_cfg_scale": 3.0, "negative_prompt": ""}


def test_a_pipeline_draws_its_own_data_once(tmp_path: Path, monkeypatch: Any) -> None:
    pipe, prompts = tiny.make("flux"), ["a cat", "a dog", "an apple"]
    arguments = {**CALL, "num_inference_steps": 2}
    first = drawn_samples(pipe, prompts, arguments, tmp_path, batch=2)
    monkeypatch.setattr("diffaccel.quant.qvgen.data._drawn", None)  # everything is there already
    again = drawn_samples(pipe, prompts, arguments, tmp_path, batch=2)
    assert torch.equal(first.x0, again.x0) and again.prompts == tuple(prompts) and first.kind == "drawn"
    for part in (pipe.transformer.proj_out.weight, next(pipe.text_encoder.parameters())):
        part.data.neg_()  # what another model drew is not taken
        with pytest.raises(TypeError, match="not callable"):
            drawn_samples(pipe, prompts, arguments, tmp_path, batch=2)
        part.data.neg_()
    model = PipelineTeacher(pipe, prompts, 2, CALL)
    run = QATRun(model, first, replace(SMALL, dropout=0.5, layers="body", rank=0, steps=3), tmp_path / "run")
    assert run.run()
    with pytest.raises(DiffAccelError, match="other prompts"):
        QATRun(PipelineTeacher(pipe, ["x"] * 3, 2, CALL), first, SMALL, tmp_path / "other")


def test_pictures_with_captions(tmp_path: Path) -> None:
    from PIL import Image

    for number, name in enumerate(("a.png", "b.jpg")):
        Image.new("RGB", (40, 50), (40 * number, 90, 120)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a blue square", encoding="utf-8")
    pipe = tiny.make("flux")
    with pytest.raises(DiffAccelError, match=r"b.jpg' has no caption"):
        encoded_pictures(pipe, tmp_path, CALL)
    line = json.dumps({"file_name": "b.jpg", "text": "a darker one"})
    (tmp_path / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    found = encoded_pictures(pipe, tmp_path, CALL)
    assert found.prompts == ("a blue square", "a darker one")
    assert tuple(found.x0.shape[1:]) == PipelineTeacher(pipe, found.prompts, 2, CALL).shape
    found.save(tmp_path / "kept.safetensors")
    assert torch.equal(read_samples(tmp_path / "kept.safetensors").x0, found.x0)
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(DiffAccelError, match="holds no samples"):
        read_samples(tmp_path / "bad.safetensors")


def test_the_optimiser_has_its_rates() -> None:
    net = prepare_qat(network(), SMALL)
    optimizer = QATOptimizer(net, SMALL)
    optimizer.step(1)
    rates = {group["name"]: group["lr"] for group in optimizer.adam.param_groups}
    share = rate_share(1, SMALL)
    assert rates["clip"] == pytest.approx(1e-2 * share) and rates["scales"] == pytest.approx(3e-5 * share)
    assert {g["name"]: g["weight_decay"] > 0 for g in optimizer.adam.param_groups}["matrices"]
    assert sum(g["weight_decay"] > 0 for g in optimizer.adam.param_groups) == 1


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_steps(whole: QATRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside of a step: the step is ended, a checkpoint written, and the rest makes the same bits."""
    broken = make(tmp_path)
    loss = broken.loss

    def interrupted(batch: Any) -> Tensor:
        if broken.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(batch)

    monkeypatch.setattr(broken, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = make(tmp_path)
    assert resumed.step == 3 and resumed.run()
    assert same(weights(resumed.student), weights(whole.student))
