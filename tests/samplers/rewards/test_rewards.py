"""Rewards: what is checked of every one, how they are written and added, JPEG sizes, counts, published scorers."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import scorers, weights
from diffaccel.samplers import rewards
from diffaccel.samplers.rewards import Reward, counts, resolve, weighted
from diffaccel.samplers.rewards.sums import terms

PROMPTS = ["a red apple", "a cat", "a red apple"]


def images(count: int = 3, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def brightness(pictures: Tensor, prompts: list[str]) -> Tensor:
    return pictures.mean((1, 2, 3))


def length(pictures: Tensor, prompts: list[str]) -> list[int]:
    return [len(prompt) for prompt in prompts]


def said(*values: float) -> Reward:
    return Reward("said", lambda pictures, prompts: list(values)[: len(pictures)])


# -- every reward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_numbers_are_float64_on_the_cpu_whatever_the_batch(batch_size):
    seen: list[tuple[int, list[str]]] = []

    def watch(pictures: Tensor, prompts: list[str]) -> Tensor:
        seen.append((len(pictures), prompts))
        return brightness(pictures, prompts)

    found = Reward("watch", watch, batch_size=batch_size)(images(), PROMPTS)
    assert found.dtype == torch.float64 and found.device.type == "cpu" and not found.requires_grad
    assert torch.allclose(found, images().mean((1, 2, 3)).double(), rtol=1e-6, atol=0)
    assert max(n for n, _ in seen) <= batch_size and [prompt for _, prompts in seen for prompt in prompts] == PROMPTS
    assert Reward("watch", watch)(images(0), []).shape == (0,)


def test_a_column_integers_and_plain_numbers_are_numbers_too():
    assert Reward("column", lambda x, p: torch.arange(3)[:, None])(images(), PROMPTS).tolist() == [0, 1, 2]
    assert Reward("length", length)(images(), PROMPTS).tolist() == [11, 5, 11]
    assert Reward("yes", lambda x, p: torch.tensor([True, False, True]))(images(), PROMPTS).tolist() == [1, 0, 1]


def test_images_go_to_the_rewards_device():
    where: list[torch.device] = []

    def on_meta(pictures: Tensor, prompts: list[str]) -> Tensor:
        where.append(pictures.device)
        return torch.zeros(len(pictures))

    Reward("far", on_meta, device=torch.device("meta"))(images(), PROMPTS)
    Reward("here", on_meta)(images(), PROMPTS)
    assert [device.type for device in where] == ["meta", "cpu"]


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (torch.zeros(2), r"'bad' returned torch.float32 of shape \(2,\) for 3 images. .* \(3,\)"),
        (torch.zeros(3, 2), r"of shape \(3, 2\) for 3 images"),
        (torch.tensor(1.0), r"of shape \(\) for 3 images"),
        (torch.zeros(3, dtype=torch.complex64), "'bad' returned torch.complex64"),
        ("high", r"'bad' failed \(\w+: "),
        (None, r"'bad' failed \(\w+: "),
    ],
)
def test_answers_that_are_no_numbers_are_refused_by_name(returned, told):
    with pytest.raises(DiffAccelError, match=told):
        Reward("bad", lambda pictures, prompts: returned)(images(), PROMPTS)


def test_what_a_function_raises_is_told_by_the_rewards_name():
    def fails(pictures: Tensor, prompts: list[str]) -> Tensor:
        raise KeyError("no such layer")

    with pytest.raises(DiffAccelError, match=r"'fails' failed \(KeyError: 'no such layer'\)") as caught:
        resolve(fails, device="cpu")(images(), PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)

    def missing(pictures: Tensor, prompts: list[str]) -> Tensor:
        raise weights.MissingWeights("not here")

    with pytest.raises(weights.MissingWeights, match=r"^not here$") as through:
        resolve(missing, device="cpu")(images(), PROMPTS)
    assert through.value.exit_code == 6


@pytest.mark.parametrize(
    ("reward", "pictures", "prompts", "told"),
    [
        (Reward("r", brightness), images().byte(), PROMPTS, r"takes pixels \(b, 3, H, W\) of floats.*torch.uint8"),
        (Reward("r", brightness), images()[0], PROMPTS, r"got torch.float32 of shape \(3, 16, 16\)"),
        (Reward("r", brightness), images()[:, :1], PROMPTS, r"of shape \(3, 1, 16, 16\)"),
        (Reward("r", brightness, input="video"), images(), PROMPTS, r"takes video \(b, 3, F, H, W\)"),
        (Reward("r", brightness), images(), PROMPTS[:2], "got 3 images and 2 prompts"),
        (Reward("r", brightness), images(1), "a", "got 1 images and one text"),
        (Reward("r", brightness, needs_prompts=True), images(), ["a", "", "b"], "compares images with their prompts"),
    ],
)
def test_what_a_reward_cannot_read_is_refused(reward, pictures, prompts, told):
    with pytest.raises(DiffAccelError, match=told):
        reward(pictures, prompts)


def test_latents_and_videos_pass_as_they_are():
    latents = Reward("latents", lambda x, p: x.flatten(1).sum(1), input="latents")
    assert latents(torch.ones(2, 7, 5), ["", ""]).tolist() == [35, 35]
    video = Reward("video", lambda x, p: x.flatten(1).sum(1), input="video")
    assert video(torch.ones(1, 3, 4, 2, 2), [""]).tolist() == [48]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"input": "pixel"}, "Unknown input of the reward 'r' 'pixel'. Did you mean 'pixels'"),
        ({"batch_size": 0}, "batch_size of the reward 'r' is 0"),
        ({"batch_size": 2.0}, r"batch_size of the reward 'r' is 2\.0"),
    ],
)
def test_impossible_rewards_are_refused(options, told):
    with pytest.raises(DiffAccelError, match=told):
        Reward("r", brightness, **options)


# -- NaN --------------------------------------------------------------------------------------------------------------


def test_nan_is_the_worst_reward_with_one_warning(caplog):
    reward = said(float("nan"), 2.0, float("nan"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert reward(images(), PROMPTS).tolist() == [-torch.inf, 2.0, -torch.inf]
    assert [record.getMessage() for record in caplog.records] == [
        "The reward 'said' returned NaN for 2 of 3 images; NaN counts as the worst reward."
    ]


def test_nothing_but_nan_is_an_error():
    with pytest.raises(DiffAccelError, match=r"'said' returned NaN for every image \(3\)"):
        said(*[float("nan")] * 3)(images(), PROMPTS)


def test_a_reward_that_worked_may_fail_on_a_single_picture(caplog):
    values = iter([1.0, float("nan")])
    reward = Reward("once", lambda pictures, prompts: [next(values)])
    assert reward(images(1), ["a"]).item() == 1
    assert reward(images(1), ["a"]).item() == -torch.inf


def test_infinite_rewards_are_left_alone():
    assert said(1.0, -torch.inf, torch.inf)(images(), PROMPTS).tolist() == [1, -torch.inf, torch.inf]


# -- gradients --------------------------------------------------------------------------------------------------------


def test_graph_leads_back_to_the_images():
    x = images().requires_grad_()
    found = Reward("brightness", brightness, batch_size=2, differentiable=True).graph(x, PROMPTS)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(gradient, torch.full_like(x, 1 / (3 * 16 * 16)))
    assert torch.equal(found.detach(), brightness(x.detach(), PROMPTS))


def test_no_graph_where_there_is_none():
    with pytest.raises(DiffAccelError, match=r"'brightness' has no gradients. Search without guidance \(guide=0\)"):
        Reward("brightness", brightness).graph(images().requires_grad_(), PROMPTS)
    cut = Reward("cut", lambda x, p: brightness(x, p).detach(), differentiable=True)
    with pytest.raises(DiffAccelError, match="'cut' says it is differentiable, but"):
        cut.graph(images().requires_grad_(), PROMPTS)


# -- what is meant ----------------------------------------------------------------------------------------------------


def test_a_callable_says_what_it_is():
    def nothing(pictures: Tensor, prompts: list[str]) -> Tensor:
        return pictures.flatten(1).sum(1)

    found = resolve(nothing, device="meta")
    assert (found.name, found.input, found.batch_size, found.device) == ("nothing", "pixels", 32, None)
    assert not found.differentiable and not found.needs_prompts

    class Network:
        name, input, batch_size, device = "mine", "latents", 4, "meta"
        differentiable = needs_prompts = True

        def __call__(self, latents: Tensor, prompts: list[str]) -> Tensor:
            return latents.flatten(1).sum(1)

    found = resolve(Network(), device="cpu")
    assert (found.name, found.input, found.batch_size, found.device) == ("mine", "latents", 4, torch.device("meta"))
    assert found.differentiable and found.needs_prompts
    assert resolve(found, device="cpu") is found
    del Network.name
    assert resolve(Network(), device="cpu").name == "Network"
    Network.device = "gpu"
    with pytest.raises(DiffAccelError, match="device of the reward 'Network' is 'gpu'; write it as torch does"):
        resolve(Network(), device="cpu")


def test_a_function_is_imported_by_its_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_rewards", SimpleNamespace(length=length))
    found = resolve("py:my_rewards:length - 2*compress", device="cpu")
    assert found.name == "py:my_rewards:length - 2*compress"
    expected = torch.tensor([11.0, 5, 11]) - 2 * resolve("compress", device="cpu")(images(), PROMPTS)
    assert torch.allclose(found(images(), PROMPTS), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("compres", "Unknown reward 'compres'. Did you mean 'compress'?.*aesthetic, clip, compress, hpsv2"),
        ("pick:score", "Unknown reward 'pick:score'"),
        ("compress+compress", "Write a sum with spaces around its signs"),
        ("", "'' is no reward"),
        ("compress +", r"'compress \+' is no reward"),
        ("py:nowhere:f", r"'py:nowhere:f' cannot be imported \(No module named 'nowhere'\)"),
        ("py:math:nothing", "'py:math:nothing' cannot be imported"),
        ("py:math", "'py:math' names no function"),
        ("vqa", "'vqa' names no model. Write vqa:/folder"),
        (
            3,
            r"must be a name, callable with images and prompts, or have compare\(.*\); got int",
        ),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_reward_is_refused(what: Any, told):
    with pytest.raises(DiffAccelError, match=told):
        resolve(what, device="cpu")


# -- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clip", [(1, "clip")]),
        ("clip + 0.2*compress", [(1, "clip"), (0.2, "compress")]),
        ("0.7*clip:emoji-clip-reward - 0.1*compress", [(0.7, "clip:emoji-clip-reward"), (-0.1, "compress")]),
        ("- compress", [(-1, "compress")]),
        ("-2 * image-reward:/a+b/c-d  -  -1e-3*clip", [(-2, "image-reward:/a+b/c-d"), (0.001, "clip")]),
        (".5*compress:50 + 3.*py:m:f", [(0.5, "compress:50"), (3, "py:m:f")]),
    ],
)
def test_sums_are_read(text, expected):
    assert terms(text) == expected


def test_a_sum_is_linear():
    a, b, c = (Reward(name, lambda x, p, i=i: x[:, i].mean((1, 2))) for i, name in enumerate("abc"))  # type: ignore[misc]
    x = images()
    found = weighted([(0.5, a), (-2, b), (1, c)])
    each = [reward(x, PROMPTS) for reward in (a, b, c)]
    assert torch.allclose(found(x, PROMPTS), 0.5 * each[0] - 2 * each[1] + each[2], rtol=1e-12)
    assert found.name == "0.5*a - 2*b + c"
    nested = weighted([(2, found), (4, b)])
    assert torch.allclose(nested(x, PROMPTS), each[0] + 2 * each[2], rtol=1e-12)
    assert weighted([(1, a)]) is a and weighted([(-1, a)]).name == "-a"
    assert torch.equal(weighted([(-1, a)])(x, PROMPTS), -each[0])


def test_a_sum_has_what_its_terms_have_in_common():
    smooth = Reward("smooth", brightness, batch_size=2, differentiable=True)
    text = Reward("text", length, batch_size=5, needs_prompts=True)
    both = weighted([(1, smooth), (1, text)])
    assert (both.batch_size, both.differentiable, both.needs_prompts) == (2, False, True)
    with pytest.raises(DiffAccelError, match=r"'smooth \+ text' has no gradients"):
        both.graph(images().requires_grad_(), PROMPTS)
    x = images().requires_grad_()
    double = weighted([(3, smooth), (-1, smooth)])
    (gradient,) = torch.autograd.grad(double.graph(x, PROMPTS).sum(), x)
    assert torch.allclose(gradient, torch.full_like(x, 2 / (3 * 16 * 16)))


def test_nan_in_one_term_is_the_worst_sum_whatever_its_weight():
    a = said(float("nan"), 1.0, 2.0)
    assert weighted([(1, Reward("b", brightness)), (-1, a)])(torch.zeros(3, 3, 2, 2), PROMPTS).tolist() == [
        -torch.inf, -1, -2,
    ]  # fmt: skip


def test_sums_that_mean_nothing_are_refused():
    pixels, latents = Reward("a", brightness), Reward("b", brightness, input="latents")
    with pytest.raises(DiffAccelError, match="'a' takes pixels, 'b' takes latents"):
        weighted([(1, pixels), (1, latents)])
    with pytest.raises(DiffAccelError, match="weight of the reward 'a' is inf"):
        weighted([(float("inf"), pixels)])
    with pytest.raises(DiffAccelError, match="at least one term"):
        weighted([])


# -- JPEG sizes -------------------------------------------------------------------------------------------------------


def test_compress_is_the_size_of_a_file_that_shows_the_picture():
    x = torch.nn.functional.interpolate(images(3, 4), (64, 48), mode="bilinear")
    for picture, score in zip(x, resolve("compress", device="cpu")(x, ["", "", ""]), strict=True):
        pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=95)
        assert score.item() == -len(file.getvalue()) / 1000
        assert (torch.from_numpy(np.array(Image.open(file))).float() - pixels).abs().mean() < 2


def test_flat_pictures_compress_best_and_so_do_low_qualities():
    x = torch.stack([torch.full((3, 32, 32), 0.5), images(1, 32)[0]])
    fine, coarse = (resolve(name, device="cpu")(x, ["", ""]) for name in ("compress", "compress:20"))
    assert fine[0] > fine[1] and coarse[1] > fine[1]
    wild = torch.stack([x[0] + 3, x[1]])  # out of [0, 1] is cut, not wrapped
    assert resolve("compress", device="cpu")(wild, ["", ""])[0] == resolve("compress", device="cpu")(
        torch.ones(1, 3, 32, 32), [""]
    )
    for wrong in ("0", "101", "high", "-5", "9.5"):
        with pytest.raises(DiffAccelError, match=f"JPEG quality of compress is '{wrong}'; it must be 1 to 100"):
            resolve(f"compress:{wrong}", device="cpu")


# -- counts -----------------------------------------------------------------------------------------------------------


def detect(pictures: Tensor, names: list[str]) -> Tensor:
    """Sees as many things as a channel's brightness says."""
    return torch.stack([pictures[:, "rgb".index(name)].mean((1, 2)).round() for name in names], 1)


def test_counts_are_squared_residuals():
    x = torch.tensor([[3.0, 2, 0], [1, 4, 9], [3, 3, 3]])[:, :, None, None].expand(3, 3, 2, 2)
    found = counts(detect, {"r": 3, "g": 2})
    assert found(x, PROMPTS).tolist() == [0, -8, -1] and found.name == "counts[3 r, 2 g]"
    wanted = {"a red apple": {"r": 1}, "a cat": {"b": 9, "g": 2}}
    each = counts(detect, wanted.__getitem__)
    assert each.needs_prompts and each(x, PROMPTS).tolist() == [-4, -4, -4]
    assert each(x[[1, 0, 2]], ["a cat", "a red apple", "a cat"]).tolist() == [-4, -4, -37]
    with pytest.raises(DiffAccelError, match="nothing to count"):
        counts(detect, {})
    with pytest.raises(
        DiffAccelError, match=r"counts of shape \(3,\) for 3 images and 1 things \(r\); expected \(3, 1"
    ):
        counts(lambda pictures, names: torch.zeros(3), {"r": 1})(x, PROMPTS)


# -- published scorers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(scorers.KNOWN))
def test_published_scorers_are_rewards_on_rounded_pictures(name, monkeypatch):
    asked: list[tuple[Any, torch.device]] = []

    def build(path: Any, device: torch.device) -> scorers.Function:
        asked.append((path, device))
        return lambda pictures, prompts: pictures.double().mean((1, 2, 3)) + len(prompts[0])

    known = scorers.KNOWN[name]
    monkeypatch.setitem(scorers.KNOWN, name, scorers.PublishedScorer(known.files, known.licence, known.paper, build))
    found = resolve(name, device="cpu")
    assert found.needs_prompts == (name != "aesthetic") and found.name == name and not found.differentiable
    rounded = (images() * 255).round().double().mean((1, 2, 3))
    assert torch.allclose(found(images(), PROMPTS), rounded + len(PROMPTS[0]), rtol=1e-12)
    assert resolve(f"2*{name}:/some/file", device="meta").name == f"2*{name}:/some/file"
    assert asked == [(None, torch.device("cpu")), ("/some/file", torch.device("meta"))]


@pytest.mark.parametrize("name", sorted(scorers.KNOWN))
def test_missing_weights_of_published_scorers_pass_through(name, tmp_path):
    with pytest.raises(weights.MissingWeights) as caught:
        resolve(f"compress + {name}:{tmp_path}", device="cpu")
    assert caught.value.exit_code == 6 and str(tmp_path) in str(caught.value)


def test_every_published_scorer_is_a_reward():
    assert set(scorers.KNOWN) <= set(rewards.KNOWN)
