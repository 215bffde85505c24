"""The commands from files to numbers against torch-fidelity, the same random weights in both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffaccel.cli import main
from tests.support import random_inception

COUNT = 10  # a side: the Inception Score takes ten splits


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root, draw = tmp_path_factory.mktemp("parity"), np.random.default_rng(0)
    random_inception.save(root / "random.pth")
    for name, size in (("a", 48), ("b", 48)):
        (root / name).mkdir()
        for i in range(COUNT):
            coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(root / name / f"{i:02d}.png")
    return root


@pytest.mark.slow
def test_one_run_of_every_metric(made, capsys):
    theirs = pytest.importorskip("torch_fidelity").calculate_metrics(
        input1=str(made / "a"), input2=str(made / "b"), fid=True, kid=True, isc=True, prc=True, cuda=False,
        # precision and recall would otherwise look for another network in the same file
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(made / "random.pth"),
        kid_subsets=1, kid_subset_size=COUNT, batch_size=COUNT, cache=False, verbose=False,
    )  # fmt: skip
    found = {}
    how = ["--protocol", "tf-fid", "--extractor", f"inception:{made / 'random.pth'}", "--allow-unknown-weights"]
    how += ["--cache", str(made / "kept"), "--json"]
    for command in ("fid", "kid", "prdc", "is"):
        sets = [str(made / name) for name in (("a",) if command == "is" else ("a", "b"))]
        capsys.readouterr()
        assert main(["eval", command, *sets, *how]) == 0
        found |= {row["metric"]: row for row in json.loads(capsys.readouterr().out)["metrics"]}
    assert found["fd"]["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    # one subset of all images is the whole U-statistic; theirs is summed in float32
    assert found["kid"]["value"] == pytest.approx(1000 * theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert found["is"]["value"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert found["is"]["detail"]["std_over_splits"] == pytest.approx(theirs["inception_score_std"], rel=1e-4, abs=1e-7)
    for name in ("precision", "recall"):
        assert found[name]["value"] == pytest.approx(theirs[name], rel=1e-5)
