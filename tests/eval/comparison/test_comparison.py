"""Distributions and prompts in a comparison: planted changes must show, in the right direction, paired by id."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import compare_runs, distribution
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.features.extract import extract
from diffaccel.eval.images.open import open_source
from diffaccel.eval.metrics import frechet, mmd
from diffaccel.eval.networks.extractors import as_clip, clips, extractor
from diffaccel.eval.sets.run import Picture, Run, open_run

COUNT = 120
WORDS = ("red apple, noto", "blue heart, noto", "rocket, noto", "two cats, noto")


def picture(seed: int) -> Image.Image:
    """Blocks of colour: something that a blur changes."""
    draw = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (3, 4, 4), generator=draw, dtype=torch.uint8)
    return Image.fromarray(small.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("sets")
    sets = {
        "base": [picture(i) for i in range(COUNT)],
        "slight": [picture(i).filter(ImageFilter.GaussianBlur(0.5)) for i in range(COUNT)],
        "strong": [picture(i).filter(ImageFilter.GaussianBlur(3)) for i in range(COUNT)],
        "other": [picture(1000 + i) for i in range(COUNT)],
        "reference": [picture(5000 + i) for i in range(COUNT)],
    }
    for name, images in sets.items():
        (root / name).mkdir()
        for i, image in enumerate(images):
            image.save(root / name / f"{i:03d}.png")
    return {name: with_prompts(open_run(root / name)) for name in sets}


def with_prompts(run: Run) -> Run:
    first = COUNT * (run.name == "other")  # seed
    pictures = [Picture(p.id, p.file, WORDS[i % len(WORDS)], first + i) for i, p in enumerate(run.pictures)]
    return Run(run.name, run.path, tuple(pictures))


@pytest.fixture(scope="module")
def tiny():
    return extractor("tiny")


@pytest.mark.slow
def test_degradations_show_in_their_order(runs, tiny):
    measures = Measures(others=runs["other"], extractors=[tiny])
    found = compare_runs(runs["base"], [runs["slight"], runs["strong"]], measures)
    slight, strong = found.row("fd", "slight"), found.row("fd", "strong")
    assert slight.key == tiny.key and slight.key.startswith("FD-tiny@") and (slight.n, slight.m) == (COUNT, COUNT)
    assert strong.value > slight.value > 0 and strong.value > strong.floor > 0
    assert strong.interval.low < strong.value < strong.interval.high and strong.delta is None
    assert strong.within_noise is False and "singular" in strong.detail["from"]
    x, y = (distribution.features(runs[name], tiny) for name in ("strong", "base"))
    assert strong.value == pytest.approx(frechet.distance_of_features(x, y), rel=1e-9)
    same_ids = [(i, i) for i in range(COUNT)]
    assert found.row("kid", "strong").value == pytest.approx(1000 * mmd.kid(x, y, pairs=same_ids), rel=1e-9)
    assert not any(found.row(metric, "strong") for metric in ("precision", "recall", "density", "coverage"))
    assert strong.interval.low > 0 and "both sides paired" in strong.interval.method


@pytest.mark.slow
def test_a_reference_gives_paired_differences(runs, tiny):
    reference = open_source(runs["reference"].path)
    found = compare_runs(runs["base"], [runs["strong"]], Measures(extractors=[tiny], reference=reference))
    base, strong = found.row("fd", "base"), found.row("fd", "strong")
    assert strong.detail["reference"] == "reference" and base.delta is None
    assert strong.delta == pytest.approx(strong.value - base.value, rel=1e-6)
    assert strong.delta_interval.low > 0 and strong.gate_value == strong.delta


@pytest.mark.slow
def test_features_are_kept_and_found_again(runs, tiny, tmp_path):
    source = runs["base"].source
    first = extract(source, tiny, cache=tmp_path, batch=7)
    (file,) = tmp_path.iterdir()
    assert extract(source, tiny, cache=tmp_path).values.equal(first.values) and first.ids == source.ids
    assert torch.allclose(extract(source, tiny, batch=50).values, first.values, atol=1e-5)
    before = file.stat().st_mtime_ns
    extract(runs["other"].source, tiny, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and file.stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def judge():
    return as_clip(extractor("emoji-clip-judge"))


@pytest.mark.slow
def test_the_fit_to_prompts(runs, judge):
    found = compare_runs(runs["base"], [runs["strong"]], Measures(others=runs["other"], clips=[judge]))
    rows = {row.run: row for row in found.rows if row.metric == "clip_score"}
    assert rows["strong"].key == "clip_score[emoji-clip-judge]" and rows["base"].delta is None
    pixels = torch.stack([runs["strong"].image(i) for i in range(COUNT)])
    image, text = judge(pixels), judge.texts(list(WORDS)).repeat(COUNT // len(WORDS), 1)
    expected = 100 * torch.cosine_similarity(image.double(), text.double()).clamp(min=0)
    assert rows["strong"].value == pytest.approx(float(expected.mean()), rel=1e-6)
    assert rows["strong"].delta == pytest.approx(rows["strong"].value - rows["base"].value, abs=1e-9)
    values = found.values["clip_score[emoji-clip-judge]"]["strong"]
    assert values.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    json.dumps(found.to_dict(), allow_nan=False)


def test_pictures_go_through_the_clips_own_preprocessing(judge):
    import open_clip

    from diffaccel import zoo

    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{zoo.path('emoji-clip-judge')}")
    image = picture(3)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    with torch.no_grad():
        expected = judge.module.encode_image(transform(image)[None])
    assert torch.allclose(judge(pixels[None]), expected, rtol=1e-5, atol=1e-6)


def test_cut_prompts_are_counted(judge):
    assert judge.truncated(["red apple, noto", " ".join(["apple"] * 200)]) == 1


def test_names(tiny, tmp_path):
    assert "emoji-clip-judge" in clips()
    with pytest.raises(DiffAccelError, match="Did you mean 'tiny'"):
        extractor("tny")
    with pytest.raises(DiffAccelError, match=r"holds no open_clip_config\.json"):
        extractor(f"open_clip:local-dir:{tmp_path}")
    with pytest.raises(DiffAccelError, match="reads no texts"):
        as_clip(tiny)
    with pytest.raises(DiffAccelError, match="float32"):
        tiny(torch.zeros(1, 3, 8, 8))


@pytest.mark.slow
def test_prompts_must_be_known(runs, judge):
    plain = {name: open_run(Path(runs[name].path)) for name in ("base", "strong")}
    with pytest.raises(DiffAccelError, match="prompts of 'base' are not known"):
        compare_runs(plain["base"], [plain["strong"]], Measures(clips=[judge]))
