"""The bench of searches on a mixture of Gaussians: its closed forms, and what it is there to show, made small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from analytic import Mixture

from diffaccel.flow import LINEAR
from diffaccel.samplers import RBF, SVDD, BoN
from scripts import bench_search_gmm as bench


def test_the_bed_is_the_mixture_in_closed_form() -> None:
    bed = bench.Bed.make(4)
    mixture = Mixture(
        (1 / bench.MODES,) * bench.MODES, tuple(map(tuple, bed.means.tolist())), (bench.STD,) * bench.MODES
    )
    x = torch.randn(5, bench.DIM, 1, 1, generator=torch.Generator().manual_seed(0))
    for sigma in (0.05, 0.5, 0.99):
        ours = bed.velocity(x, torch.tensor(sigma))
        torch.testing.assert_close(ours, mixture.velocity(LINEAR, x, sigma), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bed.nll(x), -mixture.log_density(x, 1.0, 0.0), rtol=1e-5, atol=1e-3)
    several = torch.tensor([0.1, 0.2, 0.5, 0.7, 0.9])
    each = torch.cat([bed.velocity(x[i : i + 1], several[i]) for i in range(5)])
    torch.testing.assert_close(bed.velocity(x, several.reshape(-1, 1, 1, 1)), each, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.REWARDS)
def test_at_equal_nfe(name: str) -> None:
    """Chunks make rollover climb: one child at a time rushes through the levels and falls far behind, and
    eight at a time come close to selection at every level, with likelier samples."""
    bed, budget = bench.Bed.make(24), 300
    common = {"budget": budget, "path": "vp", "tail_steps": bench.TAIL, "particles": 2}
    searches = {
        "bon": BoN(budget=budget),
        "svdd": SVDD(**common),
        "one": RBF(initial=15, beam=1, chunk=1, **common),
        "eight": RBF(initial=15, beam=1, chunk=8, **common),
    }
    found = {key: bench.measure(config, bed, name, seeds=1, steps=10) for key, config in searches.items()}
    assert all(budget - 20 <= numbers["nfe"] <= budget for numbers in found.values())
    assert found["bon"]["reward"] < found["eight"]["reward"]
    assert found["one"]["reward"] < found["eight"]["reward"]
    assert found["eight"]["reward"] > 0.9 * found["svdd"]["reward"]
    assert found["bon"]["nll"] < found["eight"]["nll"] < found["svdd"]["nll"]


def test_few_tries_a_level_are_not_spread_over_a_beam() -> None:
    """The default budget on a default number of steps: a beam that is as wide as the quota would choose nothing."""
    bed = bench.Bed.make(24)
    found = {
        config.name: bench.measure(config, bed, "linear", seeds=1, steps=28)
        for config in (RBF(budget=200), BoN(budget=200))
    }
    assert found["rbf"]["reward"] > 1.5 * found["bon"]["reward"]


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gmm.json"
    words = "--budgets 30 60 --prompts 3 --seeds 1 --rewards linear --only bon".split()
    monkeypatch.setattr(sys, "argv", ["bench_search_gmm", *words, "smc vp", "--json", str(out)])
    bench.main()
    told, text = json.loads(out.read_text()), capsys.readouterr().out
    assert [(row["budget"], row["method"]) for row in told["rows"]] == [(30, "bon"), (60, "bon"), (60, "smc vp")]
    assert "is too small, it takes 34" in text, "a budget that a method cannot use is told, not skipped in silence"
    for row in told["rows"]:
        assert f"{row['reward']:8.3f}" in text
