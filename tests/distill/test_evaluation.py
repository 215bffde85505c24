"""Looking at a run while it trains: closed forms of the meter, pictures beside the teacher's, the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distill_toys import gaussian_teacher, small_teacher
from torch import Tensor

from diffaccel.distill.evaluation import FILE, PictureEvaluation
from diffaccel.distill.meter import LEVELS, converged
from diffaccel.distill.run import Distillation
from diffaccel.distill.sim import SIM
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.distill.train import distil
from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import frechet

SMALL = SIM(steps=6, batch=8, lr=1e-3, ema_pictures=8)
PROMPTS = ("a", "b", "c", "d", "e")


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


class Colours:
    """A reader of pictures and texts: mean colours, and a colour for a text."""

    name = "colours"

    def __call__(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3))

    def texts(self, texts: list[str]) -> Tensor:
        return torch.tensor([[float(ord(text)), 1.0, 2.0] for text in texts], dtype=torch.float64)


@pytest.mark.parametrize("calls", [1, 2])
def test_training_goes_on_to_the_same_bits(calls: int, tmp_path: Path) -> None:
    config = SIM(**{**{k: v for k, v in SMALL.to_dict().items() if k != "name"}, "student_steps": calls})
    runs = [Distillation(small_teacher(2.0), config, tmp_path / name) for name in ("watched", "alone")]
    assert runs[0].run(every=1, evaluate=converged) and runs[1].run()
    for name in ("generator", "assistant"):
        watched, alone = (getattr(run, name).parameters() for run in runs)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(watched, alone, strict=True))
    assert sum("distance@0.5" in entry for entry in log(tmp_path / "watched")) == 6


def test_the_meter_is_zero_where_assistant_and_teacher_agree(tmp_path: Path) -> None:
    meter = converged(Distillation(gaussian_teacher(), SIM(batch=64, ema_pictures=0), tmp_path))
    assert all(meter[f"distance@{level}"] == 0 for level in LEVELS)
    assert meter["assistant_error"] == meter["teacher_error"] > 0 < meter["residual"]


def test_the_meter_of_two_gaussians_is_its_closed_form(tmp_path: Path) -> None:
    """``D_F - D_T = (m_F - m_T) s^2 / (a^2 std^2 + s^2)`` for Gaussians of one deviation."""
    run = Distillation(gaussian_teacher(-0.3, 0.9), SIM(batch=64, ema_pictures=0), tmp_path)
    with torch.no_grad():
        run.assistant.mean += 0.5  # type: ignore[operator]
    meter = converged(run)
    for level in LEVELS:
        expected = 0.5 * level**2 / ((1 - level) ** 2 * 0.9**2 + level**2)
        assert meter[f"distance@{level}"] == pytest.approx(expected, abs=2e-6)


def flux_call() -> dict[str, Any]:
    call = dict(tiny.call_kwargs("flux"))
    for name in ("prompt", "generator", "output_type"):
        call.pop(name, None)
    return {**call, "true_cfg_scale": 2.0, "negative_prompt": "blue"}


@pytest.mark.slow
def test_pictures_are_compared_with_the_teachers_which_are_drawn_once(tmp_path: Path) -> None:
    pipe, call = tiny.make("flux"), flux_call()
    config = SIM(steps=2, batch=2, student_steps=2, ema_pictures=0)
    run = Distillation(PipelineTeacher(pipe, PROMPTS, 2, call), config, tmp_path)
    looked = PictureEvaluation(pipe, PROMPTS, call, Colours(), batch=2)
    first = looked(run)
    own, of_teacher = looked._student(run), looked._teacher(tmp_path)
    assert own.shape == of_teacher.shape == (5, 3)
    distance = frechet.between(frechet.gaussian(own), frechet.gaussian(of_teacher))
    assert first["fd"] == pytest.approx(distance, abs=1e-3) and distance > 0
    assert first["judge_low"] <= first["judge_less_teacher"] <= first["judge_high"]
    assert first["judge_less_teacher"] == pytest.approx(first["judge"] - first["judge_teacher"], abs=2e-4)
    known = (tmp_path / FILE).read_bytes()
    looked.pipe = None  # what is known is not drawn again
    assert looked(run) == first and (tmp_path / FILE).read_bytes() == known
    (tmp_path / FILE).write_bytes(known[:-8])
    looked.pipe = pipe
    assert looked(run) == first
    other = PictureEvaluation(pipe, PROMPTS[:3], call, Colours(), batch=2)
    other(run)
    assert (tmp_path / FILE).read_bytes() != known


def test_a_student_like_its_teacher_has_no_distance(tmp_path: Path) -> None:
    pipe, call = tiny.make("flux"), flux_call()
    run = Distillation(PipelineTeacher(pipe, PROMPTS, 5, call), SIM(batch=5, ema_pictures=0), tmp_path)
    looked = PictureEvaluation(pipe, PROMPTS, call, Colours())
    looked._student = lambda run: looked._teacher(tmp_path)  # type: ignore[method-assign]
    values = looked(run)
    assert values["fd"] == values["judge_less_teacher"] == values["judge_low"] == values["judge_high"] == 0


@pytest.mark.slow
def test_evaluations_are_counted_in_drawings_and_go_on_with_the_run(tmp_path: Path) -> None:
    pipe, call = tiny.make("flux"), flux_call()
    config, seen = SIM(steps=4, batch=2, ema_pictures=0), []  # type: ignore[var-annotated]

    def look(run: Distillation) -> dict[str, float]:
        seen.append(run.pictures)
        if len(seen) == 2:
            raise KeyboardInterrupt  # the run is stopped while it looks
        return {"own": 1.0}

    arguments = {"arguments": call, "evaluate_every": 4, "evaluate": look}
    with pytest.raises(KeyboardInterrupt):
        distil(pipe, PROMPTS, SIM(steps=4, batch=2, ema_pictures=0, save_seconds=0.0), tmp_path, **arguments)
    distil(pipe, PROMPTS, config, tmp_path, **arguments)
    assert seen == [4, 8, 8]
    entries = [entry for entry in log(tmp_path) if "own" in entry]
    assert [entry["pictures"] for entry in entries] == [4, 8] and all("distance@0.9" in entry for entry in entries)
    with pytest.raises(DiffAccelError, match="evaluate_every is -1"):
        distil(pipe, PROMPTS, config, tmp_path / "other", arguments=call, evaluate_every=-1)
    with pytest.raises(DiffAccelError, match="at least 2"):
        PictureEvaluation(pipe, ("a",), call, Colours())


@pytest.mark.slow
def test_kept_features_of_a_teacher_are_of_its_weights_and_whole(tmp_path: Path) -> None:
    pipe, call = tiny.make("flux"), flux_call()
    looked = PictureEvaluation(pipe, PROMPTS[:2], call, Colours(), batch=2)
    first = looked._teacher(tmp_path)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.05)
    second = looked._teacher(tmp_path)
    assert not torch.equal(first, second)
    file = tmp_path / FILE
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    assert torch.equal(looked._teacher(tmp_path), second)
