"""The models in this installation: complete, loadable by stock libraries, and what their cards say."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffaccel import zoo
from diffaccel.zoo import packing

FLUX, JUDGE, REWARD = "emoji-flux", "emoji-clip-judge", "emoji-clip-reward"
pytestmark = pytest.mark.skipif(FLUX not in zoo.names(), reason="no trained weights are in this checkout yet")


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(zoo.path(FLUX), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe, prompt, size=64, steps=4, length=32, guidance=3.0, seed=0):
    prompts = [prompt] if isinstance(prompt, str) else prompt
    images = pipe(
        prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=guidance,
        height=size,
        width=size,
        num_inference_steps=steps,
        max_sequence_length=length,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        output_type="pt",
    ).images
    return images * 2 - 1


def test_all_three_ship_with_cards_and_notices():
    assert set(zoo.names()) >= {FLUX, JUDGE, REWARD}
    for name in (FLUX, JUDGE, REWARD):
        card, folder = zoo.card(name), zoo.path(name, verify=True)
        assert card["name"] == name and card["licence"] == "Apache-2.0" and card["state"]
        for notice in ("NOTICE", "LICENSE-MIT", "LICENSE-APACHE"):
            assert (folder / notice).stat().st_size > 0
        assert "Noto Emoji" in (folder / "NOTICE").read_text()


def test_packed_files_fit_their_limits():
    total = 0
    for name in (FLUX, JUDGE, REWARD):
        sizes = [entry["size"] for entry in packing.read_manifest(zoo._ROOT / name)["packed"].values()]
        assert max(sizes) <= packing.SHARD_BYTES
        total += sum(sizes)
    assert total < 40e6


def test_golden_picture(pipe):
    golden = zoo.card(FLUX)["golden"]
    picture = _draw(pipe, golden["prompt"], golden["size"], golden["steps"], guidance=golden["guidance"])
    values = F.adaptive_avg_pool2d(picture, 8).flatten()
    torch.testing.assert_close(values, torch.tensor(golden["values"]), rtol=0, atol=golden["tolerance"])


@pytest.mark.slow
def test_errors_as_large_as_packings_leave_pictures_alone(pipe):
    """The bf16 originals do not ship: errors of packing's law, uniform within half a step, stand in for its own."""
    g = torch.Generator().manual_seed(0)
    other = copy.deepcopy(pipe.components)
    with torch.no_grad():
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            for weight in other[part].parameters():
                if weight.dim() >= 2:
                    _, scale = packing.quantize_rows(weight)
                    error = torch.rand(weight.shape, generator=g) - 0.5
                    weight += error * scale.view(-1, *[1] * (weight.dim() - 1))
    noisy = type(pipe)(**other)
    noisy.set_progress_bar_config(disable=True)
    prompts = ["red apple, noto", "blue cat face, twemoji", "house, fluent 3d", "two balloons, noto"]
    error = (_draw(noisy, prompts, steps=8) - _draw(pipe, prompts, steps=8)).square().mean()
    psnr = 10 * math.log10(4 / error.item())
    assert psnr >= 40, psnr


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch(pipe):
    together = _draw(pipe, ["red apple, noto", "blue cat face, twemoji"], steps=2)
    alone = _draw(pipe, "blue cat face, twemoji", steps=2, seed=1)
    assert (together[1] - alone[0]).abs().max() < 1e-3


@pytest.mark.parametrize("prompt", ["", "Red APPLE, Noto", "apple " * 300, "\U0001f34e"])
def test_unusual_prompts(pipe, prompt):
    picture = _draw(pipe, prompt, steps=1)
    assert picture.shape == (1, 3, 64, 64) and picture.isfinite().all()


def test_upper_case_reads_as_lower_case(pipe):
    assert torch.equal(_draw(pipe, "Red Apple, NOTO", steps=1), _draw(pipe, "red apple, noto", steps=1))


@pytest.mark.parametrize("size", [64, 96, 128])
def test_sizes(pipe, size):
    assert _draw(pipe, "red apple, noto", size, steps=1).shape == (1, 3, size, size)


@pytest.mark.slow
def test_the_stock_default_of_512_text_tokens_draws_the_same_thing(pipe):
    short, long = (_draw(pipe, "red apple, noto", steps=4, length=length) for length in (32, 512))
    assert short.shape == long.shape
    # Training saw long padding: the two pictures agree far better than two different prompts do.
    other = _draw(pipe, "blue whale, noto", steps=4)
    assert (short - long).abs().mean() < 0.5 * (short - other).abs().mean()


@pytest.mark.slow
def test_colour_words_are_obeyed(pipe):
    from scripts.zoo.emoji import checks
    from scripts.zoo.emoji.world import COLOURS

    words = [*COLOURS, "red", "blue", "green"]
    things = ["cat face", "fish", "house", "rocket", "umbrella", "bell", "teapot", "sailboat", "pizza", "key"]
    prompts = [f"{word} {thing}, noto" for word, thing in zip(words, things, strict=True)]
    found = checks.colour(_draw(pipe, prompts))
    good = sum(COLOURS[int(i)] == word for i, word in zip(found, words, strict=True))
    assert good >= 9, good


@pytest.mark.slow
def test_number_words_are_obeyed(pipe):
    from scripts.zoo.emoji import checks

    numbers = {"two": 2, "three": 3, "four": 4}
    prompts = [f"{number} {thing}, noto" for number in numbers for thing in ("red apples", "cat faces", "balloons")]
    truth = torch.tensor([numbers[prompt.split()[0]] for prompt in prompts])
    good = int((checks.count(_draw(pipe, prompts)) == truth).sum())
    assert good >= 8, good


def test_judge_and_its_reference():
    import open_clip

    folder = zoo.path(JUDGE)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    for size in (64, 128):
        found = np.load(folder / f"fd_reference_{size}.npz", allow_pickle=False)
        mean, cov = found["mu"], found["sigma"]
        assert found["n"] > 1000 and cov.shape == (len(mean), len(mean)) and np.array_equal(cov, cov.T)
        assert np.linalg.eigvalsh(cov).min() > -1e-9 * cov.trace()
        assert json.loads(str(found["protocol"]))["size"] == size
    features = model.eval().encode_image(torch.ones(1, 3, 128, 128))
    assert features.shape == (1, len(mean))
