"""Equal wall time: how much fits is closed form of the times, the reward chooses, and the judge only judges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.eval import api
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.sets.candidates import draw_function
from diffaccel.eval.sets.run import Run, open_run
from diffaccel.eval.timing import budget, equal_time
from diffaccel.eval.timing.turns import take_turns
from diffaccel.eval.uncertainty.intervals import paired_difference
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant
from diffaccel.samplers import Heun

PROMPTS = ("red apple, noto", "blue heart, noto", "rocket, noto")
FIXED, EACH = 0.2, 0.1  # seconds of a call: t(k) = FIXED + k EACH


def test_expected_steps_invert_the_times():
    for whole in (8, 50):
        for fits in range(1, whole + 1):
            limit = FIXED + fits * EACH
            found = budget.expected_steps(FIXED + whole * EACH, whole, whole * EACH, limit)
            assert found == fits == budget.expected_steps(FIXED + whole * EACH, whole, whole * EACH, limit + 0.9 * EACH)
    assert budget.expected_steps(1.0, 8, 0.8, 0.1) == 1  # less than its fixed part
    assert budget.expected_steps(1.0, 8, 0.8, 9.0) == 8  # never more than it has


@pytest.fixture
def clockwork(monkeypatch):
    """Turns with times by the formula; the acceleration takes ``factor`` times those of the whole baseline."""

    def install(factor, whole=20, odd=0.0):
        def seconds(variant):
            if variant.methods:
                return factor * (FIXED + whole * EACH)
            steps = variant.call["steps"]
            return FIXED + steps * EACH * (1 + odd)

        def turns(pipe, request, variants, **kwargs):
            times = [seconds(v) for v in variants]
            entries = [
                {"name": v.name, "seconds_per_image": t, "parts": {"network": t - FIXED},
                 "ratio": {"value": times[0] / t, "low": 0.95 * times[0] / t, "high": 1.05 * times[0] / t}}
                for v, t in zip(variants, times, strict=True)
            ]  # fmt: skip
            return {"images_a_call": 1, "variants": entries}

        monkeypatch.setattr(budget, "take_turns", turns)
        return turns

    return install


BASE, FAST = Variant((), {"steps": 20}), Variant((Heun(),), {"steps": 20})


@pytest.fixture(scope="module")
def pipe():
    return tiny.make("flux")


def plan(clockwork, pipe, factor, **odd):
    request = Request(prompts=PROMPTS, model="mine", size=(32, 32))
    timing = clockwork(factor, **odd)(pipe, request, [BASE, FAST])
    if odd:
        timing["variants"][0]["parts"]["network"] *= 1.6  # single steps look dearer than they are
    return budget.fewer_steps(pipe, request, BASE, FAST, timing)


@pytest.mark.parametrize("factor", [0.15, 0.3, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("odd", [{}, {"odd": -0.05}])
def test_the_most_steps_that_fit_are_found(clockwork, pipe, factor, odd):
    found = plan(clockwork, pipe, factor, **odd)
    limit, each = factor * (FIXED + 20 * EACH), EACH * (1 + odd.get("odd", 0))
    expected = min(19, max(k for k in range(1, 20) if FIXED + k * each <= limit + 1e-12))
    assert found["steps"] == expected and found["ratio"]["value"] >= 1
    assert found["tried"][str(expected)] == found["ratio"]


def test_what_has_no_fewer_steps(clockwork, pipe):
    assert plan(clockwork, pipe, 1.2)["why"] == "it is no faster than the baseline itself"
    assert plan(clockwork, pipe, 0.1)["why"] == "not even one step of the baseline is as cheap"
    request, timing = Request(prompts=PROMPTS), clockwork(0.5)(pipe, None, [BASE, FAST])
    few = Variant((), {"steps": 3})
    timing["variants"].append({**timing["variants"][0], "name": few.name})
    assert "another number of steps" in budget.fewer_steps(pipe, request, BASE, few, timing)["why"]


@pytest.mark.parametrize(("factor", "pictures"), [(0.5, 1), (0.4, 2), (0.1, 9), (2.0, 1)])
def test_pictures_fit_by_the_lower_end(clockwork, pipe, reward, factor, pictures):
    request, said = Request(prompts=PROMPTS), []
    timing = clockwork(factor)(pipe, request, [BASE, FAST])
    found = budget.pictures_that_fit(pipe, request, BASE, FAST, reward, timing, progress=said.append)
    assert found["pictures"] == pictures and found["ratio"]["value"] == pytest.approx(1 / factor)
    is_measured = factor < 1  # else not even two without a reward fit
    assert bool(said) == is_measured and found["reward"] == ("emoji-clip-reward" if is_measured else "")


def test_the_rewards_time_is_part_of_the_call(pipe, reward):
    called = []

    def then(pictures, prompts):
        budget.reward_scoring(reward)(pictures, prompts)
        called.append((len(pictures), prompts))

    request = Request(prompts=PROMPTS[:2], model="mine", steps=1, size=(32, 32), batch=2)
    two = [Variant((), {"steps": 2}), Variant((Heun(),), {"steps": 1})]
    timed = take_turns(pipe, request, two, turns=2, warm_up=1, after_call={two[1].name: then})
    assert called == [(2, list(PROMPTS[:2]))] * 3  # a warm-up and two turns, of the second only
    entry = timed["variants"][1]
    assert entry["seconds_per_image"] * 2 > sum(entry["parts"].values())


@pytest.fixture(scope="module")
def reward():
    return as_clip(extractor("emoji-clip-reward"))


@pytest.fixture(scope="module")
def judge():
    return as_clip(extractor("emoji-clip-judge"))


def blocks(prompts, seeds):
    pictures = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        small = torch.randint(0, 256, (3, 4, 4), generator=draw, dtype=torch.uint8)
        pictures.append(small.repeat_interleave(8, 1).repeat_interleave(8, 2))
    return torch.stack(pictures)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("runs")
    request = Request(prompts=PROMPTS, num=2, batch=6)
    draw_function(blocks, request, root / "base")
    draw_function(lambda prompts, seeds: blocks(prompts, seeds) // 2, request, root / "fast")
    draw_function(blocks, replace(request, num=8, seed=100), root / "many")  # four for each of the baseline's
    return {name: open_run(root / name) for name in ("base", "fast", "many")}


def test_the_best_is_what_the_reward_likes_most(runs, reward):
    best = equal_time.best_by(reward, runs["many"], 4)
    liked = equal_time.scores(reward, runs["many"])
    assert len(best) == 6 and best.prompts == runs["base"].prompts
    for i, picture in enumerate(best.pictures):
        assert int(picture.id) - 4 * i == int(liked[4 * i : 4 * i + 4].argmax())
    with pytest.raises(DiffAccelError, match="does not hold 5 pictures of every prompt"):
        equal_time.best_by(reward, runs["many"], 5)


def test_answers_are_paired_differences(runs, reward, judge):
    ratio = {"value": 4.4, "low": 4.2, "high": 4.6}
    many = {"pictures": 4, "ratio": ratio}
    answer = equal_time.against_baseline(many, runs["base"], runs["fast"], runs["many"], reward=reward, judge=judge)
    best = equal_time.scores(judge, equal_time.best_by(reward, runs["many"], 4))
    base = equal_time.scores(judge, runs["base"])
    assert answer.judge.interval.value == pytest.approx(float((best - base).mean()), abs=1e-9)
    assert answer.ssim is None and answer.fd is None and answer.judge.n == 6

    fewer = replace(runs["fast"], name="fewer")
    few = equal_time.against_fewer_steps({"steps": 3, "ratio": ratio}, runs["base"], runs["fast"], fewer, judge=judge)
    assert few.judge.interval.value == 0 and few.ssim.interval.value == 0 and few.judge.ties == 6

    none = equal_time.against_fewer_steps({"steps": None, "why": "so"}, runs["base"], runs["fast"], None, judge=judge)
    section = equal_time.section([answer, few, none], judge=judge.name, reward=reward.name, device="a CPU")
    assert section.key == "equal_time" and [len(row) for row in section.rows] == [len(section.columns)] * 3
    assert "4 pictures fit" in section.rows[0][2] and "4.40x (4.20 to 4.60)" in section.rows[0][2]
    assert section.rows[2][2] == "so" and section.data["answers"][1]["ssim"]["value"] == 0
    # three prompts: no interval, neither as text nor as a number
    assert section.rows[1][3] == "+0.00, too few prompts (n = 3) for a verdict" and section.rows[1][4] == ""
    assert section.data["answers"][0]["judge"]["low"] is None


@pytest.mark.parametrize(
    ("scores", "cell"),
    [
        ([1.0, 2.0] * 10, "better"),
        ([-1.0, -2.0] * 10, "worse"),
        ([-1.0, 1.0] * 10, "not shown"),
        ([1.0, 2.0] * 4, "+1.50, too few prompts (n = 8) for a verdict"),
        ([50.0] + [0.0] * 39, "+1.25, 1 of 40 carries the spread of the difference, too few for an interval"),
    ],
)
def test_a_difference_has_the_verdict_words_of_the_report(scores, cell):
    judged = paired_difference(torch.tensor(scores), torch.zeros(len(scores)))
    own = replace(judged.interval, low=0.1, high=0.2, value=0.15)
    answer = equal_time.Answer(accelerated="a", instead="b", judge=judged, ssim=judged, fd=own, fd_is_own=True)
    row = equal_time.section([answer]).rows[0]
    assert row[3].endswith(cell) and ("better" in row[5], "worse" in row[6]) == (False, False)
    assert equal_time.section([replace(answer, fd_is_own=False)]).rows[0][6].endswith("worse") == (len(scores) == 20)


def test_the_judge_never_chooses(runs, judge):
    with pytest.raises(DiffAccelError, match="judge its own choice"):
        equal_time.against_baseline(
            {"pictures": 4}, runs["base"], runs["fast"], runs["many"], reward=judge, judge=judge
        )


@pytest.mark.slow
def test_turns_of_sides(tmp_path):
    found = api.compare(
        "plain", "heun", model=tiny.make("flux"), prompts=PROMPTS[:2], steps=2, size=(32, 32), turns=6,
        extractors=(), other_seeds=False, threads=1,
    )  # fmt: skip
    assert found.row("speedup", "heun").interval is not None
