"""Runs of distillation: which weights move, exact memory savings, resuming, processes, errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_toys import Velocity, gaussian_teacher, small_teacher
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffaccel.distill.drawing import generate
from diffaccel.distill.identity import told
from diffaccel.distill.run import Distillation
from diffaccel.distill.sim import PRESETS, SIM
from diffaccel.distill.steps import Draw, generator_step, matching_loss
from diffaccel.errors import DiffAccelError
from diffaccel.training.adam import MomentumlessAdam
from diffaccel.training.loop import Deadline

SMALL = SIM(steps=6, batch=8, lr=1e-3, ema_pictures=8)


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_adam_without_momentum_is_adam() -> None:
    networks = [Velocity(seed=3) for _ in range(2)]
    optimizers = [
        MomentumlessAdam(networks[0].parameters(), 1e-2),
        torch.optim.Adam(networks[1].parameters(), 1e-2, (0.0, 0.999)),
    ]
    for step in range(5):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            network(x, torch.full((4,), 0.3)).square().mean().backward()
            optimizer.step()
    for a, b in zip(weights(networks[0]), weights(networks[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert len(optimizers[0].state[next(networks[0].parameters())]) == 2  # no average of gradients


def test_assistant_and_teacher_stay_while_the_generator_learns(tmp_path: Path) -> None:
    run = Distillation(small_teacher(guidance=2.0), SMALL, tmp_path)
    before = weights(run.teacher.network), weights(run.assistant)
    draw = Draw.new(run.teacher, SMALL.generator_law, SMALL, torch.Generator().manual_seed(0), "cpu", (0, 1))
    run.assistant.requires_grad_(False)
    generator_step(run.teacher, run.generator, run.assistant, draw, SMALL)
    assert all(p.grad is None for network in (run.assistant, run.teacher.network) for p in network.parameters())
    assert same(before[0], weights(run.teacher.network)) and same(before[1], weights(run.assistant))
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in run.generator.parameters())


def test_a_generator_whose_assistant_is_the_teacher_does_not_move(tmp_path: Path) -> None:
    run = Distillation(small_teacher(), SMALL, tmp_path)
    draw = Draw.new(run.teacher, SMALL.generator_law, SMALL, torch.Generator().manual_seed(0), "cpu", (0, 1))
    run.assistant.requires_grad_(False)
    generator_step(run.teacher, run.generator, run.assistant, draw, SMALL)
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in run.generator.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"distance": "l2", "alpha": 0.5}, {"grad_through_scores": False}, {"space": "x0"}]
)
def test_one_network_at_a_time_has_the_same_gradient(tmp_path: Path, options: dict[str, object]) -> None:
    teacher = small_teacher(guidance=1.5)
    teacher.network.double().requires_grad_(False)
    found = []
    for sequential in (False, True):
        config = SIM(**{"batch": 8, "ema_pictures": 0, "sequential": sequential, **options})  # type: ignore[arg-type]
        generator, assistant = Velocity(seed=1).double(), Velocity(seed=2).double().requires_grad_(False)
        draw = Draw.new(teacher, config.generator_law, config, torch.Generator().manual_seed(0), "cpu", (0, 1))
        draw = Draw(draw.z.double(), draw.eps.double(), draw.sigma, draw.group)
        generator_step(teacher, generator, assistant, draw, config)
        found.append([p.grad for p in generator.parameters()])
    for joint, one_at_a_time in zip(*found, strict=True):
        torch.testing.assert_close(one_at_a_time, joint, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_a_linear_generator_finds_the_data(tmp_path: Path) -> None:
    """With the closed-form score of what it draws as the assistant, in all spaces of the family."""
    teacher = gaussian_teacher(-0.3, 0.9)
    for options in ({"distance": "l2", "space": "x0"}, {"distance": "l2", "space": "x0", "alpha": 0.5}):
        config = SIM(**{"batch": 512, "ema_pictures": 0, "grad_through_scores": True, **options})  # type: ignore[arg-type]
        spread, shift = (torch.tensor(v, requires_grad=True) for v in (1.7, 0.4))
        generator = torch.Generator().manual_seed(0)
        for step in range(400):
            draw = Draw.new(teacher, config.generator_law, config, generator, "cpu", (0, 1))
            z = draw.z - draw.z.mean()
            x0 = spread * (z / z.std()) + shift
            a, s = teacher.coefficients(draw.sigma)
            x_t = a * x0 + s * draw.eps
            own = copy.deepcopy(teacher.network)
            own.mean.data, own.std.data = shift.detach(), spread.detach()
            of_assistant, of_teacher = (teacher.ask(n, x_t, draw.sigma, 0) for n in (own, teacher.network))
            loss, _ = matching_loss(teacher, x0, x_t, of_assistant, of_teacher, draw, config)
            gradients = torch.autograd.grad(loss, (spread, shift))
            rate = 0.5 if step < 300 else 0.05
            with torch.no_grad():
                for value, gradient in zip((spread, shift), gradients, strict=True):
                    value -= rate * gradient
        assert float(spread.abs().detach()) == pytest.approx(0.9, abs=0.01)
        assert float(shift.detach()) == pytest.approx(-0.3, abs=0.01)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = Distillation(small_teacher(), SMALL, tmp_path / "whole")
    assert whole.run()
    broken = Distillation(small_teacher(), SMALL, tmp_path / "broken")
    for _ in range(3):
        broken.turn()
        broken.step += 1
    broken.save()
    broken.turn()  # lost with the process
    resumed = Distillation(small_teacher(), SMALL, tmp_path / "broken")
    assert resumed.step == 3
    assert resumed.run()
    assert same(weights(resumed.generator), weights(whole.generator))
    assert same(weights(resumed.assistant), weights(whole.assistant))
    assert same(resumed.average.shadow, whole.average.shadow)


def test_a_deadline_stops_a_run_that_goes_on_later(tmp_path: Path) -> None:
    run = Distillation(small_teacher(), SMALL, tmp_path)
    assert not run.run(Deadline(0)) and run.step == 0
    assert Distillation(small_teacher(), SMALL, tmp_path).run()


def test_checkpoints_of_other_options_or_teachers_are_refused(tmp_path: Path) -> None:
    Distillation(small_teacher(), SMALL, tmp_path).run()
    with pytest.raises(DiffAccelError, match="other options \\(lr\\)"):
        Distillation(small_teacher(), SIM(**{**_options(SMALL), "lr": 2e-3}), tmp_path)
    other = small_teacher()
    other.network = Velocity(seed=9)
    with pytest.raises(DiffAccelError, match="another teacher"):
        Distillation(other, SMALL, tmp_path)


def _options(config: SIM) -> dict[str, object]:
    return {key: value for key, value in config.to_dict().items() if key != "name"}


def test_processes_draw_the_parts_of_one_batch() -> None:
    teacher, generator = small_teacher(), torch.Generator()
    teacher.conditions = tuple(float(i) for i in range(6))
    parts = []
    for share in ((0, 1), (0, 2), (1, 2)):
        parts.append(Draw.new(teacher, SMALL.generator_law, SMALL, generator.manual_seed(4), "cpu", share))
    whole, first, second = parts
    for name in ("z", "eps", "sigma"):
        torch.testing.assert_close(torch.cat([getattr(first, name), getattr(second, name)]), getattr(whole, name))
    assert second.group == first.group + 1


def test_a_run_without_finite_gradients_ends_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = SIM(**{**_options(SMALL), "steps": 200, "log_seconds": 0.0})
    run = Distillation(small_teacher(), config, tmp_path)
    for _ in range(2):
        run.turn()
        run.step += 1
    run.save()
    good = run.checkpoint.read_bytes()
    with torch.no_grad():
        next(run.assistant.parameters()).fill_(float("nan"))
    with pytest.raises(DiffAccelError, match="gradients were not finite"):
        run.run()
    assert run.checkpoint.read_bytes() == good


def test_evaluation_sees_the_averaged_weights(tmp_path: Path) -> None:
    run = Distillation(small_teacher(), SMALL, tmp_path)
    seen: list[list[Tensor]] = []

    def evaluate(run: Distillation) -> dict[str, float]:
        seen.append(weights(run.generator))
        z = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
        return {"mean": float(generate(run.teacher, run.generator, z, 0, run.config).mean())}

    run.run(every=3, evaluate=evaluate)
    assert len(seen) == 2 and same(seen[1], run.average.shadow) and not same(seen[1], weights(run.generator))
    assert (tmp_path / "log.jsonl").read_text().count('"mean"') == 2


def test_presets_and_options() -> None:
    assert {SIM.preset(name, ema_pictures=0) for name in PRESETS} >= {
        SIM(ema_pictures=0),
        SIM.preset("sid", ema_pictures=0),
    }
    assert SIM.paper().space == "x0" and SIM.paper().start == "scaled"
    assert SIM(assistant_momentum=0.9).risk and not SIM(assistant_momentum=0.9, assistant_steps=5).risk
    with pytest.raises(DiffAccelError, match="would still be the teacher"):
        SIM(steps=10, batch=10, ema_pictures=1000)
    with pytest.raises(DiffAccelError, match="preset"):
        SIM.preset("sied")


@pytest.mark.parametrize("sequential", [False, True])
def test_the_teacher_keeps_which_of_its_weights_learn_and_their_gradients(tmp_path: Path, sequential: bool) -> None:
    teacher = small_teacher(guidance=2.0)
    first, *others = teacher.network.parameters()
    first.requires_grad_(False)
    others[0].grad = torch.ones_like(others[0])
    Distillation(teacher, SIM(**{**_options(SMALL), "sequential": sequential}), tmp_path).run()
    assert not first.requires_grad and all(p.requires_grad and p.grad is None for p in others[1:])
    assert others[0].requires_grad and bool((others[0].grad == 1).all())


@pytest.mark.parametrize("name", ["generator", "assistant"])
def test_one_network_without_finite_gradients_ends_a_run_though_the_other_has_some(tmp_path: Path, name: str) -> None:
    config = SIM(**{**_options(SMALL), "steps": 200, "log_seconds": 0.0})
    run = Distillation(small_teacher(), config, tmp_path)
    update = run._update

    def spoil(which: str, network: nn.Module) -> None:
        for p in network.parameters():
            if which == name and p.grad is not None:
                p.grad.fill_(float("nan"))
        update(which, network)

    run._update = spoil  # type: ignore[method-assign]
    with pytest.raises(DiffAccelError, match="There is no checkpoint from before"):
        run.run()
    assert 50 <= run.step < 60 and not run.checkpoint.exists()
    entries = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert entries[0][f"{name}_norm"] is None


def test_a_run_that_ends_in_steps_without_finite_gradients_is_no_success(tmp_path: Path) -> None:
    run = Distillation(small_teacher(), SMALL, tmp_path)
    with torch.no_grad():
        next(run.assistant.parameters()).fill_(float("nan"))
    with pytest.raises(DiffAccelError, match="last 6 gradients"):
        run.run()


def test_checkpoints_that_are_spoilt_or_of_other_weights_or_guidance_are_refused(tmp_path: Path) -> None:
    Distillation(small_teacher(), SMALL, tmp_path).run()
    other = small_teacher()
    with torch.no_grad():
        max(other.network.parameters(), key=lambda p: p.numel()).reshape(-1)[-1] += 1
    with pytest.raises(DiffAccelError, match="other weights"):
        Distillation(other, SMALL, tmp_path)
    with pytest.raises(DiffAccelError, match="another way \\(guidance\\)"):
        Distillation(small_teacher(guidance=2.0), SMALL, tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    whole = file.read_bytes()
    file.write_bytes(bytes([*whole[:-100], whole[-100] ^ 1, *whole[-99:]]))
    with pytest.raises(DiffAccelError, match="has not the SHA-256 that it tells"):
        Distillation(small_teacher(), SMALL, tmp_path)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        state = opened.metadata()["state"]
    save_file(
        {name: value for name, value in tensors.items() if not name.startswith("average")}, file, {"state": state}
    )
    with pytest.raises(DiffAccelError, match="is damaged: the weight 'average"):
        Distillation(small_teacher(), SMALL, tmp_path)
    file.write_bytes(whole[:-100])
    with pytest.raises(DiffAccelError, match="no whole checkpoint"):
        Distillation(small_teacher(), SMALL, tmp_path)


def test_more_processes_than_conditions_begin_again_with_the_first() -> None:
    teacher = small_teacher()
    x, sigma = torch.zeros(1, 2), torch.full((1,), 0.5)
    assert torch.equal(teacher.ask(teacher.network, x, sigma, 3), teacher.ask(teacher.network, x, sigma, 1))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"c": 0.1, "distance": "l2"}, "c is 0.1, which has no effect with distance='l2'"),
        ({"alpha": 0.7, "grad_through_scores": False}, "alpha is 0.7, which has no effect"),
        ({"mean": 1.0}, "mean is 1.0, which has no effect with levels='uniform'"),
        ({"assistant_deviation": 2.0, "assistant_levels": "uniform"}, "assistant_deviation is 2.0"),
        ({"low": 0.1, "levels": "karras"}, "low is 0.1, which has no effect"),
        ({"high": 0.9, "levels": "log_normal"}, "high is 0.9, which has no effect"),
        ({"noise_ratio": 1e9}, "noise_ratio is"),
        ({"save_seconds": -1.0}, "save_seconds is -1.0"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(DiffAccelError, match=text):
        SIM(**{**_options(SMALL), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("step", "1", "its step is '1'"), ("step", 99, "its step is 99"), ("updates", 0.5, "its updates is 0.5"),
     ("seconds", "x", "its seconds is 'x'"), ("moment", None, "'assistant_moment.0.step' is missing")],
)  # fmt: skip
def test_counters_and_moments_that_cannot_be_are_damage(tmp_path: Path, name: str, value: object, text: str) -> None:
    """A run without an optimiser's moments would go on, to other bits."""
    Distillation(small_teacher(), SMALL, tmp_path).run()
    file = tmp_path / "checkpoint.safetensors"
    with safe_open(file, "pt") as opened:
        state = json.loads(opened.metadata()["state"])
    tensors = load_file(file)
    if name == "moment":
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("assistant_moment")}
    else:
        state[name] = value
    save_file(tensors, file, {"state": json.dumps(state)})
    with pytest.raises(DiffAccelError, match=text):
        Distillation(small_teacher(), SMALL, tmp_path)


def test_a_call_is_known_by_its_dicts_arrays_and_pictures() -> None:
    """A checkpoint of a teacher that is asked with another scale of a LoRA, or another picture, is of another one."""
    picture = Image.new("RGB", (2, 2), (1, 2, 3))
    one = told({"joint_attention_kwargs": {"scale": 0.5}, "image": picture, "mask": np.zeros(3)})
    for other in (
        {"joint_attention_kwargs": {"scale": 0.6}, "image": picture, "mask": np.zeros(3)},
        {"joint_attention_kwargs": {"scale": 0.5}, "image": Image.new("RGB", (2, 2)), "mask": np.zeros(3)},
        {"joint_attention_kwargs": {"scale": 0.5}, "image": picture, "mask": np.ones(3)},
    ):
        assert told(other) != one == json.loads(json.dumps(one))


def test_the_form_of_a_bare_network_is_part_of_what_a_checkpoint_is_of(tmp_path: Path) -> None:
    Distillation(small_teacher(), SMALL, tmp_path).run()
    other = small_teacher()
    other.preserves_variance = True
    with pytest.raises(DiffAccelError, match=r"another way \(preserves_variance\)"):
        Distillation(other, SMALL, tmp_path)
