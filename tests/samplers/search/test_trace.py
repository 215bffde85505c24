"""A search that was killed goes on from its trace, to the same picture and the same decisions."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from analytic import BIMODAL
from matplotlib.figure import Figure
from search_bed import Found, Velocity, found, latent_reward, stand_in
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR
from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, SoP
from diffaccel.samplers.search import engine, report
from diffaccel.samplers.search.processes import SearchProcesses
from diffaccel.samplers.search.reward_log import RewardLog

LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.35, 0.15, 0.0])
METHODS: list[Any] = [
    RBF(budget=60, particles=2, initial=3, chunk=2, path="linear", norm=1.5),
    RBF(budget=80, particles=2, initial=3, chunk=3, path="vp", stages=5, commit="first"),
    RBF(budget=80, particles=2, initial=3, chunk=3, beam=3, begin=0.4),
    SVDD(budget=60, particles=2, temperature=0.5), CoDe(budget=60, particles=2), SMC(budget=60),
    BoN(budget=60, wave=4), SoP(budget=60, particles=1, walk=2),
]  # fmt: skip
every_method = pytest.mark.parametrize("config", METHODS, ids=lambda c: f"{c.name}-{getattr(c, 'path', '')}")


class Scorer:
    """The sum of a row, until so many calls were answered."""

    def __init__(self, answers: float = float("inf")) -> None:
        self.answers, self.calls, self.rows = answers, 0, 0

    def __call__(self, x0: Tensor) -> Tensor:
        if self.answers <= 0:
            raise KeyboardInterrupt("killed")
        self.answers, self.calls = self.answers - 1, self.calls + 1
        self.rows += len(x0)
        return x0.flatten(1).double().sum(1)


def plain(x: Tensor, sigma: Tensor) -> Tensor:
    return BIMODAL.velocity(LINEAR, x, sigma)


def of_rows(x: Tensor, sigma: Tensor) -> Tensor:
    """Depend on how many rows there are, as a network's last bits do."""
    return plain(x, sigma) * (1 + 1e-6 * len(x))


def search(config: Any, folder: Path | None, scorer: Scorer, *, velocity: Velocity = of_rows, **changes: Any) -> Found:
    config = replace(config, reward=latent_reward(scorer, differentiable=True, identity="the sum of a row"))
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    here = stand_in(noise, LEVELS, prompts=["a", "b"], folder=folder, **changes)
    return found(config, here, velocity)


def killed(config: Any, folder: Path, answers: int) -> None:
    with pytest.raises(KeyboardInterrupt, match="killed"):
        search(config, folder, Scorer(answers))


def same(a: Found, b: Found) -> None:
    assert torch.equal(a.x, b.x)
    assert a.pictures == b.pictures


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


PLOT = report.plot


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a file without a plot, which takes longer than these searches."""
    monkeypatch.setattr(report, "plot", lambda told, file: file.write(b"plot"))


@pytest.fixture
def always_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are stored after every round, however long that takes."""
    monkeypatch.setattr(engine, "STORING_SHARE", math.inf)


@pytest.mark.parametrize(
    "config",
    [*METHODS, SMC(budget=60, guide=0.5), RBF(budget=60, guide=0.05)],
    ids=lambda c: f"{c.name}-{getattr(c, 'path', '')}-{c.guide:g}",
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_killed_search_ends_as_one_that_was_not(
    config: Any, share: float, tmp_path: Path, always_stored: None
) -> None:
    """File by file and to the bit, though the network's last bits depend on which rows it sees together."""
    calls = Scorer()
    config = replace(config, keep=1)
    whole = search(config, tmp_path / "whole", calls)
    killed(config, tmp_path / "killed", 1 + int(share * (calls.calls - 2)))
    rest = Scorer()
    resumed = search(config, tmp_path / "killed", rest)
    same(resumed, whole)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert 0 < rest.rows < calls.rows, "what was scored before is not scored again"
    spent = [sum(len(e.x) for e in run.evals) for run in (resumed, whole)]
    assert spent[0] < spent[1], "nor predicted again"
    nfe = [sum(picture["nfe"] for picture in run.pictures) for run in (resumed, whole)]
    assert nfe[0] == nfe[1] == spent[1] == spent[0] + resumed.resumed["nfe"] and resumed.resumed["rounds"] > 0
    assert whole.resumed is None


@pytest.mark.parametrize("config, lost", [*((config, "never") for config in METHODS), (METHODS[0], "of others")])
def test_rounds_without_latents_are_predicted_again_in_their_own_rows(
    config: Any, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where storing takes too long, or the file is gone or of other rounds: rewards are still not computed again."""
    monkeypatch.setattr(engine, "STORING_SHARE", -1.0)
    calls = Scorer()
    whole = search(config, tmp_path / "whole", calls)
    killed(config, tmp_path, calls.calls - 1)
    latents = "latents.safetensors"
    if lost == "never":
        assert not (tmp_path / latents).exists()
    else:
        (tmp_path / latents).write_bytes((tmp_path / "whole" / latents).read_bytes())
    rest = Scorer()
    resumed = search(config, tmp_path, rest)
    same(resumed, whole)
    assert rest.rows < calls.rows
    assert [len(e.x) for e in resumed.evals] == [len(e.x) for e in whole.evals]
    assert files(tmp_path) == files(tmp_path / "whole")


@every_method
def test_killed_twice(config: Any, tmp_path: Path) -> None:
    killed(config, tmp_path, 1)
    killed(config, tmp_path, 1)
    same(search(config, tmp_path, Scorer()), search(config, None, Scorer()))


@every_method
def test_a_finished_search_is_neither_scored_nor_predicted_again(config: Any, tmp_path: Path) -> None:
    first = search(config, tmp_path, Scorer())
    before = files(tmp_path)
    again = search(config, tmp_path, Scorer(0))
    same(again, first)
    assert not again.evals and files(tmp_path) == before


@every_method
def test_a_line_that_was_cut_is_as_none(config: Any, tmp_path: Path) -> None:
    killed(config, tmp_path, 2)
    file = tmp_path / "rewards.jsonl"
    text = file.read_text()
    file.write_text(text + '{"row": 0, "chain": 0, "rew')
    same(search(config, tmp_path, Scorer()), search(config, None, Scorer()))
    assert file.read_text().startswith(text)
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_first_line_that_was_cut_is_written_again(tmp_path: Path) -> None:
    config = METHODS[0]
    killed(config, tmp_path, 1)
    file = tmp_path / "rewards.jsonl"
    file.write_text(file.read_text()[:20])
    killed(config, tmp_path, 2)
    same(search(config, tmp_path, Scorer()), search(config, None, Scorer()))


LINE = json.dumps({"round": [{"row": 0, "chain": 1, "rewards": [0.5, None]}]}).encode() + b"\n"
GARBAGE = [b"\0" * 9, b"\xff\xfe", b"[]", b'{"row": 0}', b'{"round": [{"row": 0, "chain": 0, "rewards": ["x"]}]}']


def opened(folder: Path) -> RewardLog:
    """Return the log of a search that has ended."""
    with contextlib.closing(RewardLog(folder)) as log:
        return log


@pytest.mark.parametrize("end", [b"\n", b"", b"\n\0\0\n{"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_end_is_dropped_with_a_warning_and_another_line_is_a_sentence(
    garbage: bytes, end: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    file = opened(tmp_path).file
    header = file.read_bytes()
    assert not caplog.records
    file.write_bytes(header + LINE + garbage + end)
    assert len(opened(tmp_path).rounds) == 1
    assert file.read_bytes() == header + LINE
    assert [record.getMessage() for record in caplog.records] == [
        f"The end of '{file}' is damaged; what is missing there is computed again."
    ]
    damaged = header + garbage + b"\n" + LINE
    file.write_bytes(damaged)
    with pytest.raises(DiffAccelError, match=r"Line 2 of '.*rewards\.jsonl' is damaged\. Remove the file"):
        RewardLog(tmp_path)
    assert file.read_bytes() == damaged
    file.write_bytes(b"\0" * 99 + end)
    assert not opened(tmp_path).rounds and file.read_bytes() == header


def test_of_several_processes_all_have_what_the_first_one_read(tmp_path: Path) -> None:
    """And no line that it wrote since then, or that a slower disk does not show yet."""
    here, there = tmp_path / "here", tmp_path / "there"
    first = opened(here)
    with first.file.open("ab") as file:
        file.write(LINE)
    answers = [first.file.read_text(), None]
    shutil.copytree(here, there)
    with (there / first.file.name).open("ab") as file:
        file.write(LINE.replace(b"0.5", b"0.7"))

    class Second(SearchProcesses):
        def share(self, value: Any) -> Any:
            assert value in ("", None), "the first one's is what counts"
            return answers.pop(0)

    before = (there / first.file.name).read_text()
    second = RewardLog(there, processes=Second(1, 2))
    assert [answers[0]["rewards"] for answers in second.rounds] == [[0.5, None]]
    second.append({}, guided=False)
    assert (there / first.file.name).read_text() == before


def test_another_search_s_trace_is_refused(tmp_path: Path) -> None:
    config = METHODS[0]
    killed(config, tmp_path, 2)
    before = (tmp_path / "rewards.jsonl").read_text()
    with pytest.raises(DiffAccelError, match=r"of another search: it differs in budget, norm\."):
        search(RBF(budget=61, particles=2, initial=3, chunk=2, path="linear", norm=1.4), tmp_path, Scorer())
    with pytest.raises(DiffAccelError, match=r"differs in seeds\. Remove it, or give another folder"):
        search(config, tmp_path, Scorer(), seed=9)
    assert (tmp_path / "rewards.jsonl").read_text() == before


@pytest.mark.slow
def test_rewards_are_not_those_of_another_call(tmp_path: Path) -> None:
    """Nor of other weights, nor of a reward of the same name: what a value depends on is in the log's header."""

    def refused(why: str, config: Any, **changes: Any) -> None:
        with pytest.raises(DiffAccelError, match=rf"of another search: it differs in {why}\. Remove it, or give"):
            draw(config, **changes)

    def draw(config: Any, **changes: Any) -> Tensor:
        diffaccel.accelerate(pipe, replace(config, folder=str(tmp_path)))
        try:
            return pipe(**{**tiny.call_kwargs("sd", steps=2), **changes}).images
        finally:
            diffaccel.remove(pipe)

    def bright(scale: float, shift: float = 0.0) -> Any:
        return lambda images, prompts: images.flatten(1).mean(1) * scale + shift

    pipe, config = tiny.make("sd"), BoN(budget=4, reward=bright(1.0))
    call = tiny.call_kwargs("sd", steps=2)
    first = draw(config)
    assert torch.equal(draw(replace(config, reward=bright(1.0))), first)
    refused("reward", replace(config, reward=bright(2.0)))
    refused("reward", replace(config, reward=lambda images, prompts: -images.flatten(1).mean(1)))
    refused("guidance_scale", config, guidance_scale=9.0)
    refused("prompts", config, prompt=["another", "prompt"])
    refused("negative_prompt", config, negative_prompt=["other"] * len(call["prompt"]))
    refused("wave", replace(config, wave=1))
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[0, 0] += 1e-3
    refused("the weights of text_encoder", config)


def test_what_no_decision_depends_on_may_change(tmp_path: Path) -> None:
    """After running out of memory a search goes on with smaller calls, and more of its samples may be kept."""
    config = METHODS[2]
    whole = search(config, None, Scorer(), velocity=plain)
    with pytest.raises(KeyboardInterrupt):
        search(config, tmp_path, Scorer(3), velocity=plain)
    resumed = search(replace(config, max_batch=1, keep=1), tmp_path, Scorer(), velocity=plain)
    torch.testing.assert_close(resumed.x, whole.x, rtol=0, atol=2e-6)  # rows of other calls may round otherwise
    assert resumed.decisions == whole.decisions
    assert [len(picture["rewards"]) for picture in resumed.pictures] == [2, 2]
    again = search(replace(config, keep=1), tmp_path, Scorer(0), velocity=plain)
    assert again.pictures[0]["rewards"] == resumed.pictures[0]["rewards"]


def test_a_trace_that_does_not_fit_the_moves_is_refused(tmp_path: Path) -> None:
    killed(METHODS[0], tmp_path, 2)
    file = tmp_path / "rewards.jsonl"
    first, second, *rest = file.read_text().splitlines()
    entry = json.loads(second)
    entry["round"][0]["rewards"].pop()
    file.write_text("\n".join([first, json.dumps(entry), *rest]) + "\n")
    with pytest.raises(DiffAccelError, match="has 11 rewards where this search makes 12 moves"):
        search(METHODS[0], tmp_path, Scorer())


def test_what_a_search_leaves_beside_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plot", PLOT)
    config = SVDD(budget=60, particles=2, keep=1)
    run = search(config, tmp_path, Scorer())
    told = json.loads((tmp_path / "trace.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert told == json.loads(json.dumps(run.report))
    assert (told["format"], told["interrupted"], told["final_sample_kind"]) == (2, False, "t0")
    assert [p["prompt"] for p in told["pictures"]] == ["a", "b"]
    pictures = sorted(path.name for path in tmp_path.glob("*.png") if path.name != "reward.png")
    assert pictures == [
        f"00{row}-{place}_{reward:.4g}.png"
        for row, picture in enumerate(run.pictures)
        for place, reward in enumerate(picture["rewards"])
    ]
    assert (tmp_path / "reward.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.part"))
    for picture in told["pictures"]:
        rewards = [step["reward"] for step in picture["climb"] if not step["sample"]]
        assert rewards == sorted(rewards)
        assert picture["scored"] >= picture["nfe"]  # every level's states, and the samples


def test_the_plot_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, what its lines and dots are, what was spent, and where the call's own noise stands; to the end."""
    run, figures = search(METHODS[0], None, Scorer()), []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: figures.append(figure))
    PLOT(run.report, io.BytesIO())
    axes = figures[0].axes[0]
    spent = run.pictures[0]["nfe"]
    assert axes.get_title() == f"rbf: {spent} of 60 NFE a picture"
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts[:3] == [
        "best prediction so far, $r(x_0)$", "the final sample", "the call's own noise, nothing chosen yet",
    ]  # fmt: skip
    assert [text.partition(" (seed ")[0] for text in texts[3:]] == ["a", "b"]
    solid, dots, dotted = ([line for line in axes.lines if line.get_linestyle() == kind] for kind in ("-", "None", ":"))
    for picture, climb, dot, own in zip(run.pictures, solid, dots, dotted, strict=True):
        assert (climb.get_xdata()[-1], dot.get_xdata()[0]) == (spent, spent)
        assert dot.get_ydata()[0] == picture["reward"] and own.get_ydata()[0] == picture["own"]
        assert climb.get_ydata()[0] >= picture["own"]


def test_rewards_without_a_word_in_json(tmp_path: Path) -> None:
    """NaN is the worst reward; the trace keeps it, and the report has None for it."""

    def some(x0: Tensor) -> Tensor:
        sums = x0.flatten(1).double().sum(1)
        return torch.where((1000 * sums).floor() % 3 == 0, torch.nan, sums)

    def run() -> Found:
        here = stand_in(torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(3)), LEVELS, folder=tmp_path)
        config = BoN(budget=60, reward=latent_reward(some), keep=9)
        return found(config, here, lambda x, sigma: BIMODAL.velocity(LINEAR, x, sigma))

    first, again = run(), run()
    same(again, first)
    text = (tmp_path / "trace.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert None in json.loads(text)["pictures"][0]["rewards"]
