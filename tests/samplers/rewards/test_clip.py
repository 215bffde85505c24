"""CLIP as a reward: the evaluation's numbers, open_clip's preprocessing, gradients, and which CLIP is meant."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import clip_score as alignment
from diffaccel.eval.networks import weights
from diffaccel.eval.networks.extractors import extractor
from diffaccel.samplers.rewards import Reward, clip, resolve

PROMPTS = ["a red apple", "a cat", "a glossy car"]
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


def smooth(count: int, *size: int, seed: int = 0) -> Tensor:
    """uint8 pictures without the edges that a second rounding changes most."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size, mode="bilinear") * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def reward() -> Reward:
    return resolve("clip", device="cpu", model="emoji-flux")


# -- the number -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "tolerance"), [((128, 128), 1e-3), ((64, 64), 0.1), ((200, 150), 0.1)])
def test_it_is_the_cosine_that_the_evaluation_computes(reward, size, tolerance):
    pictures = smooth(3, *size)
    expected = 100 * alignment.prompt_cosine(extractor("emoji-clip-reward"), pictures, PROMPTS)
    found = reward(pictures / 255, PROMPTS)
    assert (found - expected).abs().max() < tolerance
    assert found.min() < -1  # a cosine, not cut at 0
    scored = alignment.score(extractor("emoji-clip-reward"), pictures, PROMPTS)
    assert (found.clamp_min(0) - scored.values).abs().max() < tolerance


def test_the_zoos_clip_tells_pictures_apart(reward):
    assert reward.name == "clip:emoji-clip-reward" and reward.differentiable and reward.needs_prompts
    red, blue = torch.zeros(2, 3, 128, 128).unbind()
    red[0], blue[2] = 1, 1
    both = torch.stack([red, blue])
    assert reward(both, ["a red circle"] * 2).argmax() == 0 and reward(both, ["a blue square"] * 2).argmax() == 1


@pytest.mark.parametrize("size", [(32, 32), (40, 57), (90, 33), (20, 20), (31, 97)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("target", [32, (24, 40)])
def test_preprocessing_is_open_clips(monkeypatch, target, mode, interpolation, size):
    config = PreprocessCfg(size=target, resize_mode=mode, interpolation=interpolation, fill_color=7)
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda network: vars(config))
    picture = smooth(1, *size)
    ours = clip.preprocessing(None)(picture / 255)[0]
    theirs = image_transform_v2(config, is_train=False)(Image.fromarray(picture[0].permute(1, 2, 0).numpy()))
    assert ours.shape == theirs.shape
    levels = (ours - theirs).abs() * torch.tensor(config.std).view(3, 1, 1) * 255
    assert levels.max() < 1.1


def test_a_network_is_asked_in_float32_and_once_a_prompt(reward, monkeypatch):
    fresh, texts = resolve("clip:emoji-clip-reward", device="cpu"), []
    encode = open_clip.model.CLIP.encode_text

    def counted(self, tokens: Tensor, **options: bool) -> Tensor:
        texts.append(len(tokens))
        return encode(self, tokens, **options)

    monkeypatch.setattr(open_clip.model.CLIP, "encode_text", counted)
    pictures = smooth(3, 128, 128) / 255
    with torch.inference_mode():
        found = fresh(pictures, ["a cat", "a dog", "a cat"])
    with torch.autocast("cpu", torch.bfloat16):
        again = fresh(pictures, ["a cat", "a dog", "a cat"])
    assert texts == [1, 1]
    assert torch.equal(found, again)
    x = pictures.clone().requires_grad_()  # texts kept from inference mode serve gradients too
    (gradient,) = torch.autograd.grad(fresh.graph(x, ["a cat"] * 3).sum(), x)
    assert gradient.abs().sum(dim=(1, 2, 3)).min() > 0
    assert torch.allclose(fresh(pictures[:1], ["a cat"]), found[:1], atol=1e-4)


@pytest.mark.parametrize("side", [128, 64, 200])
def test_gradients_are_those_of_finite_differences(reward, side):
    x = (0.3 + 0.4 * smooth(2, side, side, seed=1) / 255).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.graph(x, PROMPTS[:2]).sum(), x)
    step, x = 0.01, x.detach()
    for row in range(2):
        slope = gradient[row].norm()
        move = torch.zeros_like(x)
        move[row] = step * gradient[row] / slope
        change = (reward(x + move, PROMPTS[:2]) - reward(x - move, PROMPTS[:2])) / (2 * step)
        assert change[row].item() == pytest.approx(slope.item(), rel=1e-2)
        assert abs(change[1 - row].item()) < 1e-2 * slope  # pictures do not see each other


def test_climbing_the_gradient_raises_the_reward(reward):
    x = (smooth(1, 64, 64) / 255).requires_grad_()
    before = reward(x.detach(), ["a red apple"])
    for _ in range(5):
        (gradient,) = torch.autograd.grad(reward.graph(x, ["a red apple"]).sum(), x)
        x = (x.detach() + 0.5 * gradient / gradient.norm()).clamp(0, 1).requires_grad_()
    assert reward(x.detach(), ["a red apple"]) > before + 5


# -- which CLIP -------------------------------------------------------------------------------------------------------


def test_the_zoos_model_has_its_own_by_name_and_by_folder(reward):
    assert clip.default("emoji-flux") == clip.default(str(zoo.path("emoji-flux"))) == "emoji-clip-reward"
    assert set(clip.DEFAULTS) <= set(zoo.names()) and set(clip.DEFAULTS.values()) <= set(zoo.names())
    assert "emoji-clip-judge" not in clip.DEFAULTS.values()  # the judge only judges, unless it is asked for by name
    asked = resolve("clip:emoji-clip-judge", device="cpu")
    pictures = smooth(2, 128, 128) / 255
    assert not torch.allclose(asked(pictures, PROMPTS[:2]), reward(pictures, PROMPTS[:2]), atol=1)


@pytest.mark.parametrize("model", ["", "black-forest-labs/FLUX.1-dev", "/nowhere"])
def test_another_model_has_none_until_it_is_named(model):
    with pytest.raises(
        DiffAccelError,
        match=r"names no CLIP, and only emoji-flux and emoji-flux-1step have one .* clip:/folder \(open_clip",
    ):
        resolve("clip + compress", device="cpu", model=model)


def test_an_unknown_clip_is_told_the_one_for_rewards():
    with pytest.raises(DiffAccelError, match=r"Unknown CLIP 'emoji-clip'\. Did you mean 'emoji-clip-reward'"):
        resolve("clip:emoji-clip", device="cpu")
    with pytest.raises(DiffAccelError, match="Unknown CLIP 'emoji-flux'") as caught:
        resolve("clip:emoji-flux", device="cpu")
    assert "judge" not in str(caught.value)


def test_folders_and_files_are_read_as_the_evaluation_reads_them(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", copy.deepcopy(SMALL))
    torch.manual_seed(0)
    model = open_clip.create_model("small").eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": SMALL, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    pictures, texts = smooth(2, 32, 32) / 255, open_clip.get_tokenizer("small")(PROMPTS[:2])
    with torch.no_grad():
        features = model.encode_image((pictures - 0.5) / 0.25)
        expected = 100 * torch.cosine_similarity(features, model.encode_text(texts)).double()
    found = resolve(f"clip:{tmp_path}", device="cpu")(pictures, PROMPTS[:2])
    assert torch.allclose(found, expected, atol=1e-3)
    name = f"clip:small:{tmp_path / 'open_clip_model.safetensors'}"
    file = resolve(name, device="cpu")
    assert file.name == name
    assert not torch.allclose(file(pictures, PROMPTS[:2]), found, atol=1e-2)  # OpenAI's mean and std, not the folder's


def test_missing_weights_pass_through(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", copy.deepcopy(SMALL))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    for spec in (f"clip:{tmp_path}", f"0.5*clip:small:{tmp_path / 'none.safetensors'} + compress"):
        with pytest.raises(weights.MissingWeights) as caught:
            resolve(spec, device="cpu")
        assert caught.value.exit_code == 6
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(DiffAccelError, match=r"holds no open_clip_config\.json"):
        resolve(f"clip:{tmp_path}", device="cpu")
