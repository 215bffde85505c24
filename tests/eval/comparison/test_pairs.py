"""CLIP-I, scorers, categories and runs of different pictures: closed forms on pictures made here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import categories, compare_runs
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.comparison.row import Row, within_bounds
from diffaccel.eval.comparison.verdict import word
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.networks.scorers import Scorer
from diffaccel.eval.report import contents
from diffaccel.eval.sets import prompts
from diffaccel.eval.uncertainty import intervals
from diffaccel.eval.uncertainty.intervals import Interval
from tests.support import made_runs

WORDS = [f"thing {i // 2}" for i in range(24)]  # two pictures of each prompt


def brightness(images, texts):
    return images.double().mean((1, 2, 3))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    pictures = [made_runs.blocks(i) // 2 for i in range(24)]
    changed = [picture + (20 if i < 12 else 10) for i, picture in enumerate(pictures)]
    made = {
        "base": pictures,
        "same": pictures,
        "brighter": changed,
        "other": [made_runs.blocks(99 + i) for i in range(24)],
    }
    return {
        name: made_runs.of_images(root / name, images, WORDS, first_seed=24 * (name == "other"))
        for name, images in made.items()
    }


@pytest.fixture(scope="module")
def judge():
    return as_clip(extractor("emoji-clip-judge"))


@pytest.mark.slow
def test_clip_i_is_the_cosine_to_the_pair(sets, judge):
    found = compare_runs(sets["base"], [sets["same"], sets["brighter"]], Measures(others=sets["other"], clips=[judge]))
    same, brighter = found.row("clip_i", "same"), found.row("clip_i", "brighter")
    assert same.value == 1 and same.identical and brighter.key == "CLIP-I[emoji-clip-judge]"
    one, other = (judge(torch.stack([sets[name].image(i) for i in range(24)])) for name in ("base", "brighter"))
    expected = torch.cosine_similarity(one.double(), other.double())
    assert brighter.value == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found.pair_values(brighter).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert brighter.floor < brighter.value < 1 and brighter.interval.low < brighter.value < brighter.interval.high


def test_a_scorer_gives_paired_differences(sets):
    found = compare_runs(sets["base"], [sets["brighter"]], Measures(scorers=[Scorer("brightness", brightness, "none")]))
    base, row = found.row("brightness", "base"), found.row("brightness", "brighter")
    assert base.delta is None and row.value - base.value == pytest.approx(15) and row.delta == pytest.approx(15)
    assert 10 <= row.delta_interval.low < 15 < row.delta_interval.high <= 20 and row.detail["wins"]["share"] == 1
    assert found.gate_values("brighter")["brightness"] == pytest.approx(15) and row.detail["licence"] == "none"


def test_the_floor_of_a_score_is_a_paired_difference_with_its_interval(sets):
    """Not the size of one draw of chance: other seeds minus the baseline, prompt by prompt."""
    scorer = Scorer("brightness", brightness)
    result = compare_runs(sets["base"], [sets["brighter"]], Measures(others=sets["other"], scorers=[scorer]))
    row = result.row("brightness", "brighter")
    images = {name: torch.stack([sets[name].image(i) for i in range(24)]) for name in ("other", "base")}
    change = brightness(images["other"], WORDS) - brightness(images["base"], WORDS)
    expected = intervals.bootstrap_mean(change, clusters=WORDS)
    assert row.floor == pytest.approx(float(change.mean())) and row.floor_interval.null == 0
    assert (row.floor_interval.low, row.floor_interval.high) == pytest.approx((expected.low, expected.high))
    ends = f"({expected.low:+.3f} to {expected.high:+.3f})"
    assert f"{expected.value:+.3f} {ends}" in result.table()
    ssim = result.row("ssim", "brighter")
    assert ssim.floor_interval.low < ssim.floor < ssim.floor_interval.high and ssim.floor_interval.units == 12
    assert result.to_dict()["metrics"][0]["floor_interval"]["units"] == 12


def test_a_value_is_beyond_noise_where_its_interval_and_the_floors_are_apart():
    def row(value, half, floor, floor_half, better="higher"):
        ends = (
            None if h is None else intervals.Interval(v, v - h, v + h, units=20)
            for v, h in ((value, half), (floor, floor_half))
        )
        own, of_floor = ends
        return Row(
            metric="ssim", key="SSIM", family="fidelity", run="r", better=better, value=value, interval=own,
            floor=floor, floor_interval=of_floor,
        )  # fmt: skip

    assert row(0.9, 0.1, 0.8, 0.1).within_noise is True
    assert row(0.79, 0.02, 0.8, 0.02).within_noise is True  # two draws of the same chance
    assert row(0.7, 0.02, 0.8, 0.02).within_noise is False
    assert row(0.9, 0.02, 0.8, 0.02, "lower").within_noise is False
    assert row(0.7, 0.02, 0.8, None).within_noise is None


def test_a_row_whose_interval_is_withheld_or_that_is_identical_is_not_called_one_prompt():
    def row(**more):
        return Row(metric="ssim", key="SSIM", family="fidelity", run="r", better="higher", n=40, **more)

    lone = row(value=0.95, floor=0.1)
    lone.set_interval("interval", intervals.Interval(0.95, 0.9, 1.0, units=40, carriers=1.0))
    assert lone.interval is None and lone.too_few == "" and lone.within_noise is None
    assert "1 of 40 carries the spread, too few for an interval" in lone.detail["from"]
    assert row(identical=True).too_few == "" and row(value=0.95).too_few == "too few prompts (n = 1) for a verdict"


@pytest.mark.slow
def test_few_carriers_of_a_spread_are_counted_and_one_alone_gives_no_interval(tmp_path):
    texts, pictures = [f"thing {i}" for i in range(40)], [made_runs.blocks(i) // 2 for i in range(40)]
    base = made_runs.of_images(tmp_path / "base", pictures, texts)
    scorer, rows = Scorer("brightness", brightness), {}
    for name, ruined in (("one", {5}), ("three", {5, 9, 21}), ("all", set(range(40)))):
        changed = [picture + (50 + i if i in ruined else 0) for i, picture in enumerate(pictures)]
        run = made_runs.of_images(tmp_path / name, changed, texts)
        rows[name] = compare_runs(base, [run], Measures(scorers=[scorer])).row("brightness", name)
    one, three = rows["one"], rows["three"]
    assert one.delta_interval is None and one.detail["delta_carried_by"] == 1 and one.within_noise is None
    assert one.detail["from"].endswith("1 of 40 carries the spread of the difference, too few for an interval")
    assert three.delta_interval.low < three.delta < three.delta_interval.high
    assert three.detail["delta_carried_by"] == 3 and "3 of 40 carry" in three.detail["from"]
    assert "delta_carried_by" not in rows["all"].detail and rows["all"].within_noise is False


def test_identical_pairs_are_counted_and_never_lost(tmp_path):
    pictures = [made_runs.blocks(i) // 2 for i in range(12)]
    changed = [picture + (2 if i in (3, 7) else 0) for i, picture in enumerate(pictures)]
    texts = [f"{'ab'[i < 6]} {i}" for i in range(12)]
    base = made_runs.of_images(tmp_path / "base", pictures, texts)
    run = made_runs.of_images(tmp_path / "run", changed, texts)
    (tmp_path / "p.csv").write_text("prompt,category\n" + "\n".join(f"{text},{text[0]}" for text in texts))
    result = compare_runs(base, [run], Measures(prompts=str(tmp_path / "p.csv")))
    row, differing = result.row("psnr", "run"), 20 * math.log10(255 / 2)
    assert row.value == pytest.approx(differing) and (row.n, row.m) == (2, 12) and not row.identical
    assert row.detail["identical_pairs"] == 10
    assert row.detail["pooled"] == pytest.approx(differing + 10 * math.log10(6))
    assert "10 of 12 pairs identical" in row.detail["from"] and "49.89 dB over the pixels of all" in row.detail["from"]
    cells = [entry["metrics"]["PSNR"] for entry in result.sections[0].data["categories"]]
    assert [cell["identical_pairs"] for cell in cells] == [5, 5] and "5 identical" in result.sections[0].rows[0][3]


@pytest.mark.parametrize(("count", "verdict"), [(9, "too few prompts (n = 9) for a verdict"), (10, "better")])
def test_no_verdict_of_fewer_than_ten_prompts(tmp_path, count, verdict):
    pictures, texts = [made_runs.blocks(i) // 2 for i in range(count)], [f"thing {i}" for i in range(count)]
    base = made_runs.of_images(tmp_path / "base", pictures, texts)
    run = made_runs.of_images(tmp_path / "run", [picture + 20 + i for i, picture in enumerate(pictures)], texts)
    result = compare_runs(base, [run], Measures(scorers=[Scorer("brightness", brightness)]))
    row = result.row("brightness", "run")
    assert row.within_noise is (None if count < 10 else False) and row.delta_interval.units == count
    assert f"({verdict})" in result.table().splitlines()[0] and "noise" not in result.table()


def test_one_prompt_gets_no_verdict(tmp_path):
    pictures = [made_runs.blocks(i) for i in range(2)]
    base, run, other = (
        made_runs.of_images(tmp_path / name, [picture // k for picture in pictures], ["thing"] * 2, first_seed=seed)
        for k, name, seed in ((2, "base", 0), (3, "run", 0), (4, "other", 2))
    )
    result = compare_runs(base, [run], Measures(others=other, scorers=[Scorer("brightness", brightness)]))
    for row in result.rows:  # each says why it has no interval
        assert (row.interval is None and "one prompt: no interval" in row.detail["from"]) or row.family == "cost"
    assert "one prompt: no interval" in result.table()
    row = result.row("ssim", "run")
    assert row.within_noise is None and row.too_few == "too few prompts (n = 1) for a verdict"


def test_a_scorer_sees_the_prompt_of_each_picture(sets):
    seen = []

    def watched(images, texts):
        seen.extend(texts)
        return brightness(images, texts)

    compare_runs(sets["base"], [sets["same"]], Measures(scorers=[Scorer("watched", watched)]))
    assert seen == WORDS * 2


def test_categories_split_what_the_pairs_are(sets, tmp_path):
    file = tmp_path / "prompts.jsonl"
    kinds = {text: "early" if i < 12 else "late" for i, text in enumerate(WORDS)}
    file.write_text("\n".join(json.dumps({"prompt": text, "category": kinds[text]}) for text in kinds))
    scorer = Scorer("brightness", brightness)
    found = compare_runs(sets["base"], [sets["brighter"]], Measures(scorers=[scorer], prompts=str(file)))
    section = next(section for section in found.sections if section.key == categories.KEY)
    early, late = section.data["categories"]
    assert (early["category"], early["n"], late["n"]) == ("early", 12, 12)
    assert early["metrics"]["brightness"]["value"] == pytest.approx(20) and "low" not in early["metrics"]["brightness"]
    assert late["metrics"]["brightness"]["value"] == pytest.approx(10)
    assert late["metrics"]["PSNR"]["value"] == pytest.approx(20 * torch.log10(torch.tensor(255 / 10)).item(), rel=1e-6)
    assert section.columns[-1] == "brightness, difference" and section.rows[0][-1] == "+20.000"


def test_intervals_of_categories_need_ten_prompts(tmp_path):
    texts = [f"{'a' if i < 12 else 'b'} {i}" for i in range(21)]
    images = [made_runs.blocks(i) // 2 for i in range(21)]
    base = made_runs.of_images(tmp_path / "base", images, texts)
    run = made_runs.of_images(tmp_path / "run", [x + i for i, x in enumerate(images)], texts)
    file = tmp_path / "p.csv"
    file.write_text("prompt,category\n" + "\n".join(f"{text},{text[0]}" for text in texts))
    found = compare_runs(base, [run], Measures(scorers=[Scorer("brightness", brightness)], prompts=str(file)))
    a, b = (entry["metrics"]["brightness"] for entry in found.sections[0].data["categories"])
    assert a["value"] == pytest.approx(5.5) and a["low"] < 5.5 < a["high"]
    assert b["value"] == pytest.approx(16) and "low" not in b


def test_a_category_that_one_pair_carries_has_no_interval(tmp_path):
    texts = [f"{'ab'[i < 40]} {i}" for i in range(52)]
    images = [made_runs.blocks(i) // 2 for i in range(52)]
    base = made_runs.of_images(tmp_path / "base", images, texts)
    run = made_runs.of_images(tmp_path / "run", [x + (60 if i == 7 else 2) for i, x in enumerate(images)], texts)
    (tmp_path / "p.csv").write_text("prompt,category\n" + "\n".join(f"{text},{text[0]}" for text in texts))
    scorers = [Scorer("brightness", brightness)]
    found = compare_runs(base, [run], Measures(scorers=scorers, prompts=str(tmp_path / "p.csv"))).sections[0]
    numbers = found.data["categories"][1]["metrics"]["brightness"]
    assert numbers["value"] == pytest.approx(2 + 58 / 40) and "low" not in numbers and numbers["carried_by"] == 1
    assert "1 of 40 carries the spread, too few for an interval" in found.rows[1][-1]


def test_a_packaged_set_is_recognised(tmp_path):
    emoji = prompts.read("emoji-1000")
    texts = emoji.texts[:3]
    base = made_runs.of_images(tmp_path / "base", [made_runs.blocks(i) for i in range(3)], texts)
    assert categories.category_of_prompts(base) == dict(zip(texts, emoji.categories[:3], strict=True))
    mine = made_runs.of_images(tmp_path / "mine", [made_runs.blocks(0)], ["no such prompt"])
    assert categories.category_of_prompts(mine) == {}
    with pytest.raises(DiffAccelError, match="names no category of 1 of 1 prompts of 'mine', such as 'no such prompt'"):
        categories.category_of_prompts(mine, "emoji-1000")


def test_runs_of_different_pictures_share_pairs_only_when_asked(sets, tmp_path):
    images = [made_runs.blocks(i) // 2 + 5 for i in range(2, 30)]
    texts = [*WORDS[2:], *["later"] * 6]
    more = made_runs.of_images(tmp_path / "more", images, texts)
    moved = type(more)("more", more.path, tuple(type(p)(p.id, p.file, p.prompt, p.seed + 2) for p in more.pictures))
    with pytest.raises(DiffAccelError, match=r"2 of 24 pictures of the baseline are missing.*--allow-mixed-n"):
        compare_runs(sets["base"], [moved])
    measures = Measures(scorers=[Scorer("brightness", brightness)], allow_mixed_n=True)
    found = compare_runs(sets["base"], [moved], measures)
    assert found.pairs["more"] == [(i + 2, i) for i in range(22)] and found.row("psnr", "more").n == 22
    assert found.row("brightness", "more").delta == pytest.approx(5)
    assert any("28 pictures, base 24, and 22 are in both" in said for said in found.warnings)
    nothing = type(more)("none", more.path, tuple(type(p)(p.id, p.file, "x", p.seed) for p in more.pictures))
    with pytest.raises(DiffAccelError, match="24 of 24 pictures"):
        compare_runs(sets["base"], [nothing], Measures(allow_mixed_n=True))


@pytest.mark.slow
def test_a_short_name_that_two_rows_share_is_no_gate(sets, judge):
    found = compare_runs(sets["base"], [sets["same"]], Measures(clips=[judge]))
    row = found.row("clip_score", "same")
    found.rows.append(type(row)(**{**vars(row), "key": "clip_score[another]"}))
    values = found.gate_values("same")
    assert "clip_score" not in values and {"clip_score[another]", "clip_score[emoji-clip-judge]"} <= values.keys()


def test_pictures_beside_videos_are_refused(sets, tmp_path):
    video = made_runs.of_videos(tmp_path / "video", [made_runs.blocks(0).expand(3, 3, 32, 32)], ["thing 0"])
    with pytest.raises(DiffAccelError, match="'video' holds videos and 'base' pictures"):
        compare_runs(sets["base"], [video])
    assert not Path(video.path / ".features").exists()


def test_no_interval_leaves_the_values_that_a_metric_can_have(tmp_path):
    """Two prompts give the widest intervals: those of SSIM and its floor end at -1 and 1 all the same."""
    pictures, texts = [made_runs.blocks(i) for i in range(2)], ["ab 1", "ab 2"]
    base = made_runs.of_images(tmp_path / "base", pictures, texts)
    run = made_runs.of_images(tmp_path / "run", [pictures[0], 255 - pictures[1]], texts)
    other = made_runs.of_images(tmp_path / "other", [pictures[0], pictures[0]], texts, first_seed=2)
    row = compare_runs(base, [run], Measures(others=other)).row("ssim", "run")
    assert (row.interval.low, row.interval.high) == (row.floor_interval.low, row.floor_interval.high) == (-1.0, 1.0)
    wide = Interval(40.0, -900.0, 1000.0)
    assert within_bounds("clip_score", wide) == Interval(40.0, 0.0, 100.0)
    assert within_bounds("clip_score", wide, is_difference=True) == Interval(40.0, -100.0, 100.0)
    assert within_bounds("brightness", wide) == wide and within_bounds("ssim", None) is None


def test_pictures_of_one_colour_are_named_and_never_better(tmp_path):
    pictures, texts = [made_runs.blocks(i) for i in range(12)], [f"thing {i}" for i in range(12)]
    broken = [torch.zeros_like(picture) if i % 2 else picture for i, picture in enumerate(pictures)]
    base = made_runs.of_images(tmp_path / "base", [*pictures[:11], torch.zeros_like(pictures[0])], texts)
    run = made_runs.of_images(tmp_path / "run", broken, texts)
    darkness = Scorer("darkness", lambda images, _: -brightness(images, _))
    report = contents(result := compare_runs(base, [run], Measures(scorers=[darkness])))
    assert (
        word(next(row for row in report["metrics"] if row["metric"] == "darkness" and row["run"] == "run")) == "better"
    )
    assert report["verdicts"][0]["word"] == "not shown"
    assert "5 of its pictures of one colour" in report["verdicts"][0]["text"]
    assert "run: 5 of 12 pictures are of one colour" in result.warnings[0] and "'00001'" in result.warnings[0]
    whole = compare_runs(base, [made_runs.of_images(tmp_path / "whole", [p // 2 for p in pictures], texts)])
    assert whole.warnings == []


def test_other_seeds_must_be_other_seeds_of_the_baseline(tmp_path):
    pictures, texts = [made_runs.blocks(i) for i in range(3)], [f"thing {i}" for i in range(3)]
    base = made_runs.of_images(tmp_path / "base", pictures, texts, {"settings": {"steps": 8}})
    twin = made_runs.of_images(tmp_path / "twin", pictures, texts, {"settings": {"steps": 8}})
    fewer = made_runs.of_images(tmp_path / "fewer", pictures, texts, {"settings": {"steps": 4}}, first_seed=3)
    with pytest.raises(DiffAccelError, match="3 of its 3 pictures have the prompt and the seed of one of 'base'"):
        compare_runs(base, [twin], Measures(others=twin))
    with pytest.raises(DiffAccelError, match=r"it differs from 'base' in steps \(8 -> 4\)"):
        compare_runs(base, [twin], Measures(others=fewer))
    with pytest.raises(DiffAccelError, match="They are one folder"):
        compare_runs(base, [base])


def test_a_damaged_picture_is_named_with_its_run(tmp_path):
    pictures, texts = [made_runs.blocks(i) for i in range(2)], ["a", "b"]
    base, run = (made_runs.of_images(tmp_path / name, pictures, texts) for name in ("base", "run"))
    file = run.pictures[1].file
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DiffAccelError, match=r"^run: The image '00001\.png' cannot be read"):
        compare_runs(base, [run])
