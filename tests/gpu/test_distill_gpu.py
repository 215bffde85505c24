"""Distillation on a GPU: bf16 runs of one and two calls, memory of one network at a time, low rank, evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from diffaccel.distill.evaluation import PictureEvaluation
from diffaccel.distill.meter import converged
from diffaccel.distill.run import Distillation
from diffaccel.distill.sim import SIM
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.distill.train import distil
from diffaccel.eval.networks import extractors
from scripts.bench_distill import LARGE, make_teacher

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"student_steps": 2}, {"student_steps": 2, "rank": 4}])
def test_a_run_in_bf16_is_looked_at_and_resumes(options: dict[str, int], tmp_path: Path) -> None:
    pipe = tiny.make("flux").to("cuda")
    call = {k: v for k, v in tiny.call_kwargs("flux").items() if k in ("height", "width", "max_sequence_length")}
    looked = PictureEvaluation(pipe, ("a", "b", "c"), call, extractors.extractor("tiny", device="cuda"), batch=2)
    config = SIM(steps=4, batch=4, lr=1e-3, ema_pictures=0, **options)
    common = {"arguments": call, "dtype": BF16, "evaluate_every": 8, "evaluate": looked}
    run = distil(pipe, ("a", "b", "c", "d"), config, tmp_path, **common)
    assert run.step == 4 and (tmp_path / "log.jsonl").read_text().count('"fd"') == 2
    assert distil(pipe, ("a", "b", "c", "d"), config, tmp_path, **common).step == 4
    teacher = PipelineTeacher(pipe, ("a", "b", "c", "d"), 4, call)
    assert all(value == value for value in converged(Distillation(teacher, config, tmp_path, dtype=BF16)).values())


def test_one_network_at_a_time_takes_at_most_half_the_activations(tmp_path: Path) -> None:
    teacher, peaks = make_teacher(LARGE, 128, torch.device("cuda")), []
    for sequential in (False, True):
        config = SIM(batch=128, ema_pictures=128, sequential=sequential)
        run = Distillation(teacher, config, tmp_path / str(sequential), dtype=BF16)
        run.turn()  # the moments are there from now on
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.turn()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del run
        torch.cuda.empty_cache()
    assert peaks[1] <= 0.5 * peaks[0]
