"""On a closed-form target: what a side branch gives and does not give; the numbers are printed."""

from __future__ import annotations

import statistics
from argparse import Namespace
from typing import Any

import pytest
import qvgen_bed
import torch

from scripts.qvgen_toy import measured

SEEDS = (0,)  # scripts.qvgen_toy repeats it over seeds, with more steps


@pytest.mark.slow
def test_a_side_branch_against_none_at_one_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """Training starts nearer to the model and with smaller gradients; which ends lower is printed, and not asserted."""
    torch.set_num_threads(1)
    net = qvgen_bed.trained(600)
    args, means = Namespace(steps=60, rank=16, lr=3e-4, phase_steps=0), {}
    for bits in (4, 3):
        for way in ("lsq", "qvgen"):
            found: list[dict[str, Any]] = [measured(net, way, bits, seed, args) for seed in SEEDS]
            means[bits, way] = {key: statistics.fmean(f[key] for f in found) for key in found[0]}
            with capsys.disabled():
                print(f"\nW{bits}A{bits} {way}: {means[bits, way]}")
    for bits in (4, 3):
        assert means[bits, "qvgen"]["start"] < means[bits, "lsq"]["start"]
        assert means[bits, "qvgen"]["early_norm"] < means[bits, "lsq"]["early_norm"]
        for way in ("lsq", "qvgen"):
            assert means[bits, way]["distance"] < 0.7 * means[bits, "lsq"]["start"]  # both learn
    assert means[4, "qvgen"]["distance"] < means[3, "qvgen"]["distance"]
