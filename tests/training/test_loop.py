"""Schedule, EMA, deadlines and resuming of the step loop."""

import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.training.ema import EMA
from diffaccel.training.loop import Deadline, TrainingPlan, TrainingRun


def _plan(**changes):
    return TrainingPlan(**{"lr": 0.05, "samples": 80, "warmup": 3, "restart_warmup": 4, "ema": 0.9, **changes})


def _run(folder, plan=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return TrainingRun(folder, "toy", {"model": model}, plan or _plan(), seed=7, **options)


def _train(run, stop_at=None):
    for step in run:
        x = torch.randn(8, 4, generator=run.generator)
        target = torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1)
        run.update(nn.functional.mse_loss(run.module["model"](x), target), samples=8)
        if stop_at is not None and step + 1 == stop_at:
            break
    return run


def test_rate_is_warmup_then_flat_then_cosine_to_the_floor():
    plan = TrainingPlan(lr=2.0, samples=100, warmup=10, flat=0.5, floor=0.1)
    assert plan.rate(0, 0) == pytest.approx(0.2) and plan.rate(4, 0.1) == pytest.approx(1.0)
    assert plan.rate(50, 0.5) == 2.0
    assert plan.rate(50, 0.75) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert plan.rate(50, 1.0) == pytest.approx(0.2)
    assert plan.rate(60, 0.5, restarted_at=60) == pytest.approx(2.0 / plan.restart_warmup)


def test_progress_follows_the_nearer_end():
    plan = TrainingPlan(lr=1.0, samples=100, seconds=50)
    assert plan.progress(10, 25) == 0.5 and plan.progress(80, 25) == 0.8 and plan.progress(200, 0) == 1
    with pytest.raises(DiffAccelError, match="neither samples nor seconds"):
        TrainingPlan(lr=1.0)
    with pytest.raises(DiffAccelError, match="flat"):
        TrainingPlan(lr=1.0, samples=1, flat=1.0)


def test_ema_is_the_weighted_sum_of_what_it_saw():
    module = nn.Linear(1, 1, bias=False)
    values = [3.0, -1.0, 2.0, 5.0]
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema, expected = EMA(module, 0.2), 1.0
    for n, value in enumerate(values):
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update()
        decay = min(0.2, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert ema.shadow[0].item() == pytest.approx(expected, rel=1e-6)
    with ema:
        assert module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == 5.0 and ema.shadow[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_the_model_learns_and_the_log_counts(tmp_path):
    run = _train(_run(tmp_path, _plan(samples=4000, log_seconds=0.0)))
    entries = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert run.finished and run.step == 500 and entries[-1]["samples"] == 4000 and entries[-1]["progress"] == 1
    assert sum(e["loss"] for e in entries[-50:]) < 0.2 * sum(e["loss"] for e in entries[:50])


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_an_interrupted_run_ends_bit_equal(tmp_path, stop):
    whole = _train(_run(tmp_path / "whole"))
    _train(_run(tmp_path / "cut"), stop_at=stop)
    resumed = _run(tmp_path / "cut")
    assert resumed.step in (stop - 1, stop)
    _train(resumed)
    assert resumed.step == whole.step == 10
    for a, b in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.ema.shadow, resumed.ema.shadow, strict=True):
        assert torch.equal(a, b)


def test_weights_that_travelled_without_moments_restart_with_a_warmup(tmp_path):
    run = _train(_run(tmp_path / "first"), stop_at=5)
    run.save(tmp_path / "second" / "toy.safetensors", moments=False)
    again = _run(tmp_path / "second")
    assert again.restarted_at == again.step == run.step
    assert not again.optimizer.state
    _train(again, stop_at=again.step + 1)
    assert again.optimizer.param_groups[0]["lr"] <= 0.05 / 4 + 1e-12


def test_a_deadline_stops_and_saves(tmp_path):
    run = _train(_run(tmp_path, _plan(samples=10**9), deadline=Deadline(0.3)))
    assert 0 < run.samples < 10**9
    assert _run(tmp_path, _plan(samples=10**9)).step == run.step
    assert _train(_run(tmp_path / "none", deadline=Deadline(-1))).step == 0


def test_seconds_end_a_run_and_add_up_over_jobs(tmp_path):
    run = _train(_run(tmp_path, _plan(samples=math.inf, seconds=0.2)))
    assert run.finished and _run(tmp_path, _plan(samples=math.inf, seconds=0.2)).finished


def test_a_gradient_that_is_not_finite_counts_as_zero(tmp_path):
    run = _run(tmp_path, _plan(weight_decay=0.0))
    before = [p.detach().clone() for p in run.parameters]
    for _ in run:
        run.update(sum(p.sum() for p in run.parameters) * math.nan, samples=8)
        break
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    assert _run(tmp_path).step in (0, 1)


def test_a_step_without_update_is_an_error(tmp_path):
    with pytest.raises(DiffAccelError, match="made no update"):
        for _ in _run(tmp_path):
            pass


def test_a_save_killed_halfway_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run = _train(_run(tmp_path), stop_at=3)
    good = run.checkpoint.read_bytes()

    def killed(descriptor):
        os.truncate(descriptor, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr("diffaccel.files.os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert run.checkpoint.read_bytes() == good


@pytest.mark.parametrize("damage", ["weight", "moment", "step", "digest", "cut", "short", "empty"])
def test_a_checkpoint_that_was_changed_is_refused(tmp_path, damage):
    """One bit anywhere, in weights, moments or the state, and a file that is cut off."""
    run = _train(_run(tmp_path), stop_at=3)
    with safe_open(run.checkpoint, "pt") as file:
        digest, names = file.metadata()["digest"], list(file.keys())
    data = bytearray(run.checkpoint.read_bytes())
    assert any(name.startswith("moment.") for name in names)
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:size]))
    name = next((name for name in names if name.startswith(f"{damage}.") and "exp_avg" in name), names[0])
    begin = size + header[name]["data_offsets"][0]
    if damage in ("weight", "moment"):
        data[begin] ^= 1
    elif damage == "step":
        assert b'step\\": 3' in data[:size]
        data[:size] = data[:size].replace(b'step\\": 3', b'step\\": 2')
    elif damage == "digest":
        data[:size] = data[:size].replace(digest.encode(), digest[::-1].encode())
    run.checkpoint.write_bytes(data[: {"cut": -5, "short": 5, "empty": 0}.get(damage, len(data))])
    with pytest.raises(DiffAccelError, match=r"no whole checkpoint|has not the SHA-256 that it tells") as error:
        _run(tmp_path)
    assert "Remove it to begin anew" in str(error.value)


def test_a_checkpoint_without_a_digest_is_read(tmp_path):
    """As older versions wrote them: the run goes on to the same bits."""
    run = _train(_run(tmp_path), stop_at=3)
    with safe_open(run.checkpoint, "pt") as file:
        state = file.metadata()["state"]
    save_file(load_file(run.checkpoint), run.checkpoint, {"state": state})
    resumed = _train(_run(tmp_path), stop_at=5)
    for ours, theirs in zip(resumed.parameters, _train(run, stop_at=5).parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    _train(_run(tmp_path), stop_at=2)
    with pytest.raises(DiffAccelError, match="another shape"):
        TrainingRun(tmp_path, "toy", {"model": nn.Linear(3, 3)}, _plan())


def test_a_step_that_is_interrupted_inside_of_its_update_is_made_again(tmp_path):
    """Between the optimiser's step and the counters, weights and counters are of two steps: that is not kept."""
    whole, cut = _train(_run(tmp_path / "whole")), _run(tmp_path / "cut", _plan(save_seconds=0))

    def interrupt(*_):
        if cut.step == 5:
            raise KeyboardInterrupt

    cut.optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        _train(cut)
    resumed = _run(tmp_path / "cut")
    assert resumed.step == 5
    _train(resumed)
    for a, b in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    _train(_run(tmp_path, settings={"batch": 8, "drafts": (1, 2)}), stop_at=2)
    _run(tmp_path), _run(tmp_path, settings={"batch": 8, "drafts": [1, 2]})
    with pytest.raises(DiffAccelError, match=r"is of other settings \(batch\)\. Take another folder"):
        _run(tmp_path, settings={"batch": 9, "drafts": [1, 2]})


@pytest.mark.parametrize(("name", "value"), [("step", "1"), ("step", -1), ("updates", 1.5), ("seconds", math.inf)])
def test_counters_that_cannot_be_are_damage(tmp_path, name, value):
    run = _train(_run(tmp_path), stop_at=2)
    with safe_open(run.checkpoint, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    tensors = load_file(run.checkpoint)
    save_file(tensors, run.checkpoint, {"state": json.dumps({**state, name: value})})
    with pytest.raises(DiffAccelError, match=f"is damaged: its {name} is {value!r}. Remove it"):
        _run(tmp_path)


def test_a_log_goes_on_behind_a_line_that_was_cut_off(tmp_path):
    (tmp_path / "toy.jsonl").write_text('{"step": 1, "lo', encoding="utf-8")
    _train(_run(tmp_path, _plan(log_seconds=0, samples=16)))
    lines = (tmp_path / "toy.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"step": 1, "lo' and [json.loads(line)["step"] for line in lines[1:]] == [1, 2]


@pytest.mark.parametrize("option", ["lr", "seconds", "ema", "save_seconds"])
def test_a_plan_of_no_number_is_named(option):
    with pytest.raises(DiffAccelError, match=f"TrainingPlan.{option} is nan; it must be from 0 to"):
        _plan(**{option: math.nan})


def test_what_killed_saves_left_of_its_checkpoint_is_removed(tmp_path):
    for name in (".toy.safetensors.0123abcd.tmp", ".other.safetensors.0123abcd.tmp"):
        (tmp_path / name).touch()
    _run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".other.safetensors.0123abcd.tmp"]
