"""Benches of superposition on few samples: exact models, two halves of the data, tables over the number of steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fashion_data import make_data

from diffaccel.samplers import SuperDiff
from scripts import bench_superdiff as rules
from scripts import bench_superdiff_curve as curve
from scripts import bench_superdiff_error as error
from scripts import bench_superdiff_halves as halves
from scripts.zoo.fashion import data, unet
from scripts.zoo.fashion import recipe as recipes

# -- error where densities are known -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", error.PATHS)
def test_the_exact_models_have_the_velocity_of_their_density(path: str) -> None:
    """The score, from the velocity, is the gradient of the log-density."""
    model = error.beds()["2-D, overlapping"][1]
    line, times = error.levels(path, 4, euler=False)
    t = times[2]
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(model.log_density(line, x, float(t)).sum(), x)
    eps = line.eps(x, model.velocity(line, x, t), t)
    torch.testing.assert_close(-eps / line.sigma(t), score, rtol=1e-8, atol=1e-8)


def test_one_gaussian_is_tracked_exactly_and_draws_are_of_the_data() -> None:
    only = error.Modes(torch.zeros(1, 3, dtype=torch.float64), 0.7)
    path, times = error.levels("vp", 12, euler=False)
    made = error.sample(SuperDiff(op="or", data_std=0.7), (only, only), path, times, 50, 0)
    difference = made.tracked - made.true
    assert (difference[:, 0] - difference[:, 1]).abs().max() == 0 and made.predictions == 24
    assert difference.abs().max() < 1e-3, "noise of the first level is not exactly the data's"
    drawn = only.draw(4000, torch.Generator().manual_seed(0))
    assert float(drawn.std()) == pytest.approx(0.7, rel=0.03)


def test_a_ratio_of_errors_and_an_energy_distance() -> None:
    draw = torch.Generator().manual_seed(0)
    b = torch.rand(500, generator=draw, dtype=torch.float64) + 1
    ratio = error.ratio_of_means(4 * b, b, 0.5)
    assert ratio.value == pytest.approx(2) and ratio.low == pytest.approx(2) == ratio.high
    x, y = (torch.randn(400, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    moved, _ = error.energy(x + 1.0, y)
    near, influences = error.energy(x, y)
    assert abs(near) < 0.02 < 0.5 < moved
    least = influences(torch.arange(400)).argmin()
    kept = torch.arange(400) != least
    assert error.energy(x[kept], y)[0] > near, "the row that lowers the distance most, left out, raises it"


def test_the_bench_of_errors_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "40", "--paper", "12", "--steps", "6", "--paths", "vp", "--out", str(tmp_path)]
    error.main([*arguments, "--beds", "2-D, overlapping"])
    first = capsys.readouterr().out
    error.main([*arguments, "--beds", "2-D, overlapping"])
    second = capsys.readouterr().out
    assert "2-D, overlapping, vp, or: paper at 12, 24 predictions" in first and first.endswith(second)
    assert second.startswith("| models") and second.count("\n| 2-D") == 1
    cells = json.loads((tmp_path / "bench_superdiff_error_cpu.json").read_text())["cells"]
    assert [row["predictions"] for row in cells["2-D, overlapping; vp"]] == [24, 12, 12, 12, 12, 24, 12, 12, 24]


# -- two models of half of the data ------------------------------------------------------------------------------------


def test_a_network_under_one_label_is_a_network_without_labels() -> None:
    network = unet.build(recipes.TINY, 0).eval()
    x, t = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, 800.0])
    for label in (3, unet.NO_LABEL):
        with torch.no_grad():
            expected = network(x, t, class_labels=torch.full((2,), label)).sample
            torch.testing.assert_close(unet.without_labels(network, label)(x, t).sample, expected, rtol=1e-4, atol=1e-5)


def test_classes_are_selected(tmp_path: Path) -> None:
    part = data.load(make_data(tmp_path / "data"), "train", "cpu")
    first, second = (data.of_classes(part, classes) for classes in halves.HALVES.values())
    assert set(first.labels.tolist()) == {0, 1, 2, 3, 4} and len(first) + len(second) == len(part)
    assert torch.equal(first.images, part.images[part.labels < 5])


@pytest.mark.slow
def test_two_halves_are_trained_drawn_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second call draws only what is missing; OR with all weight on one network is that network's own drawing."""
    made = make_data(tmp_path / "data")
    arguments = ["--recipe", "tiny", "--data", str(made), "--work", str(tmp_path / "work"), "--device", "cpu",
                 "--steps", "3", "--pictures"]  # fmt: skip
    halves.main([*arguments, "40"])
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work" / "drawn_3").iterdir()}
    halves.main([*arguments, "60"])
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work" / "drawn_3").iterdir()}
    assert len(before) == 6 and len(after) == 9 and before.items() <= after.items()
    assert "or / coin flip" in capsys.readouterr().out
    record = json.loads((tmp_path / "work" / "bench_superdiff_halves_cpu.json").read_text())
    assert record["rows"]["or"]["pictures"] == record["rows"]["coin flip"]["pictures"] == 60 and record["finished"]
    fd = {name: entry["fd"][0] for name, entry in record["rows"].items()}
    assert record["ratio"][0] == pytest.approx(fd["or"] / fd["coin flip"], rel=1e-6)
    bench = halves.Bench(halves.make_parser().parse_args([*arguments, "60"]))
    pipes = list(bench.pipes.values())
    alone, _ = halves.drawn(pipes[:1], bench.config, 4, 3, 7)
    both, kappa = halves.drawn(pipes, SuperDiff(op="or", data_std=bench.config.data_std, weights=(1, 0)), 4, 3, 7)
    assert kappa.shape == (3, 4, 2) and (alone.int() - both.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("ratio", "said"), [((1.0, 0.97, 1.04), "held"), ((1.2, 1.1, 1.3), "missed"), ((1.03, 0.99, 1.07), "open")]
)
def test_the_interval_of_the_ratio_decides(ratio: tuple[float, ...], said: str) -> None:
    assert halves.verdict(list(ratio)) == said


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_the_documented_commands_draw_every_rule_once() -> None:
    """The number of steps is another bench's: this one draws one form of each rule, or all of them to choose from."""
    text = (Path(__file__).parents[2] / "docs" / "superdiff.md").read_text(encoding="utf-8")
    commands = [line.split()[3:] for line in text.splitlines() if line.startswith("python -m scripts.bench_superdiff ")]
    drawn = {args.split: [family for _, family, *_ in rules.work(args, {})]
             for args in map(rules.make_parser().parse_args, commands)}  # fmt: skip
    assert drawn["held-out"] == list(rules.FAMILIES)
    assert drawn["tune"] == [family for family, forms in rules.FAMILIES.items() for _ in forms]
    with pytest.raises(SystemExit):
        rules.make_parser().parse_args(["--curve"])


# -- the number of steps -----------------------------------------------------------------------------------------------


def cell(kernel: str, steps: int, block: int, scores: list[float]) -> dict[str, Any]:
    return {"kernel": kernel, "steps": steps, "block": block, "seconds": 1.0, "rows_a_picture": 3.0 * steps,
            "pairs": list(range(len(scores))), "worse": scores, "both": [0.0] * len(scores),
            "one": [1.0] * len(scores)}  # fmt: skip


def test_the_table_over_steps_pairs_pictures_of_the_blocks_that_all_have() -> None:
    base = [30 + 10 * math.sin(i) for i in range(20)]
    noise = [0.1 * math.cos(7 * i) for i in range(20)]
    done = [
        cell("euler", 1000, 0, base), cell("matched", 100, 0, [v + 0.5 + e for v, e in zip(base, noise, strict=True)]),
        cell("euler", 100, 0, [v - 5 + e for v, e in zip(base, noise, strict=True)]),
        cell("euler", 1000, 1, [0.0] * 20),
    ]  # fmt: skip
    rows = {(row["kernel"], row["steps"]): row for row in curve.table(done, 1.0)}
    assert rows["matched", 100]["pictures"] == 20 and "longest" not in rows["euler", 1000]
    assert rows["matched", 100]["longest"][0] == pytest.approx(0.5, abs=0.1)
    assert rows["matched", 100]["equal"][0] == pytest.approx(5.5, abs=0.01)
    assert rows["matched", 100]["verdict"] == "level or better" and rows["euler", 100]["verdict"] == "worse"
    assert curve.verdict([0.0, -2.0, 2.0], 1.0) == "open"
    assert curve.head(list(rows.values())).count("1000") == 2 and curve.shown(rows["matched", 100]).count("|") == 11


def test_cells_are_ordered_by_block_and_steps() -> None:
    assert curve.cells([100, 25], 2)[:5] == [
        ("euler", 25, 0), ("matched", 25, 0), ("euler", 100, 0), ("matched", 100, 0), ("euler", 25, 1),
    ]  # fmt: skip
