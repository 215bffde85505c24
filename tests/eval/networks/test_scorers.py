"""Scorers: what is checked of every one, and the published ones on small random networks of their kinds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.eval.errors import MetricFailed
from diffaccel.eval.networks import preference, weights
from diffaccel.eval.networks.resize import to_pil
from diffaccel.eval.networks.scorers import KNOWN, scorer

PROMPTS = ["a red apple", "a cat on a mat", "a red apple"]


def images(count: int = 3, height: int = 48, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "weights"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "_in_hub_cache", lambda repository, file: None)


# -- every scorer -----------------------------------------------------------------------------------------------------


def brightness(pictures: Tensor, prompts: list[str]) -> Tensor:
    return pictures.float().mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])


def test_a_function_is_a_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    got = scorer(brightness)
    assert got.name == "brightness" and got.licence == ""
    values = got(images(), PROMPTS)
    assert values.dtype == torch.float64
    assert torch.equal(values, brightness(images(), PROMPTS).double())
    assert scorer(got) is got
    monkeypatch.setitem(sys.modules, "my_scores", SimpleNamespace(brightness=brightness))  # type: ignore[arg-type]
    named = scorer("py:my_scores:brightness")
    assert named.name == "py:my_scores:brightness" and torch.equal(named(images(), PROMPTS), values)
    column = scorer(lambda pictures, prompts: [[1.0], [2.0], [3.0]])
    assert column(images(), PROMPTS).tolist() == [1.0, 2.0, 3.0]


def test_a_scorer_that_answers_wrongly_is_named() -> None:
    def refused(answer: Any, message: str) -> None:
        def mine(pictures: Tensor, prompts: list[str]) -> Any:
            return answer(pictures) if callable(answer) else answer

        with pytest.raises(DiffAccelError, match=f"The scorer 'mine' {message}"):
            scorer(mine)(images(), PROMPTS)

    refused([1.0, math.nan, math.inf], "gave 2 of 3 images no finite score, the first is image 1: nan")
    refused([1.0, 2.0], r"returned shape \(2,\) for 3 images")
    refused(1.0, r"returned shape \(\) for 3 images")
    refused(None, "failed .*Error")
    refused(lambda pictures: pictures[7], r"failed \(IndexError: .*7")
    with pytest.raises(MetricFailed) as caught:
        scorer(lambda pictures, prompts: pictures[7])(images(), PROMPTS)
    assert caught.value.exit_code == 4


def test_inputs_and_names_are_checked() -> None:
    got = scorer(brightness)
    for call, message in [
        (lambda: got(images(), PROMPTS[:2]), "3 images, but 2 prompts"),
        (lambda: got(images() / 255, PROMPTS), "must be uint8"),
        (lambda: got(images(), "cat"), "got one text"),
        (lambda: scorer("hps"), r"Unknown scorer 'hps'. Did you mean 'hpsv2'.*py:module:function"),
        (lambda: scorer("py:nowhere_at_all:f"), "'py:nowhere_at_all:f' cannot be imported .*nowhere_at_all"),
        (lambda: scorer("py:math:f"), "'py:math:f' cannot be imported"),
        (lambda: scorer("py:math"), "names no function"),
        (lambda: scorer("py:math:pi"), "callable with images and prompts; got float"),
        (lambda: scorer(brightness, "file.pt"), "'path' goes with aesthetic"),
    ]:
        with pytest.raises(DiffAccelError, match=message):
            call()


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_missing_weights_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(weights.MissingWeights, match="not found; looked for") as found:
        scorer(name)
    assert KNOWN[name].files[0] in str(found.value) and str(tmp_path / "weights") in str(found.value)
    assert found.value.exit_code == 6
    with pytest.raises(weights.MissingWeights, match="gone"):
        scorer(name, tmp_path / "gone")
    assert KNOWN[name].licence and KNOWN[name].paper


# -- LAION aesthetic --------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """The published head, dropout and all."""

    def __init__(self, size: int = 768) -> None:
        super().__init__()
        sizes, drops = (size, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1, None, None)
        parts: list[nn.Module] = []
        for a, b, drop in zip(sizes, sizes[1:], drops, strict=False):
            parts += [nn.Linear(a, b), *([nn.Dropout(drop)] if drop else [])]
        self.layers = nn.Sequential(*parts)


def test_aesthetic_is_its_linear_network_on_normalised_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = Head().eval()
    assert sorted(head.state_dict())[::2] == [f"layers.{i}.bias" for i in (0, 2, 4, 6, 7)]
    file = tmp_path / preference.AESTHETIC
    torch.save(head.state_dict(), file)
    features = 7 * torch.randn(3, 768)
    got = scorer("aesthetic", file, clip=lambda pictures: features[: len(pictures)])
    assert "Apache" in got.licence
    with torch.no_grad():
        expected = head.layers(nn.functional.normalize(features))[:, 0]
    torch.testing.assert_close(got(images(), PROMPTS), expected.double(), rtol=1e-5, atol=1e-7)


def test_aesthetic_takes_both_networks_from_a_folder(small_open_clip: tuple[str, Any, Path]) -> None:
    import open_clip
    from safetensors.torch import save_file

    architecture, model, file = small_open_clip
    head = Head(24).eval()
    torch.save(head.state_dict(), file.parent / preference.AESTHETIC)
    with pytest.raises(weights.MissingWeights, match=preference.OPEN_CLIP):
        scorer("aesthetic", file.parent, architecture=architecture)
    save_file(model.state_dict(), file.parent / preference.OPEN_CLIP)
    got = scorer("aesthetic", file.parent, architecture=architecture)
    pictures = images(3, 40, 60)
    prepare = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        features = model.encode_image(torch.stack([prepare(to_pil(picture)) for picture in pictures]), normalize=True)
        expected = head.layers(features)[:, 0]
    torch.testing.assert_close(got(pictures, PROMPTS), expected.double(), rtol=1e-4, atol=1e-6)


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = Head(8).state_dict()
    for broken in (
        {},
        {"layers.0.weight": torch.ones(1, 4)},
        {"layers.0.weight": torch.ones(4), "layers.0.bias": torch.ones(4)},
        {key: value for key, value in state.items() if not key.startswith("layers.2.")},
        {key: value for key, value in state.items() if not key.startswith("layers.7.")},
    ):
        with pytest.raises(DiffAccelError, match="not the weights of a linear head"):
            preference.linear_head(broken)
    with pytest.raises(DiffAccelError, match=r"features \(B, 8\); got \(3, 9\)"):
        preference.linear_head(state)(torch.ones(3, 9))
    file = tmp_path / preference.AESTHETIC
    torch.save(state, file)
    with pytest.raises(DiffAccelError, match=r"The scorer 'aesthetic' failed .*features"):
        scorer("aesthetic", file, clip=lambda pictures: torch.ones(len(pictures), 9))(images(), PROMPTS)


# -- HPSv2 on open_clip -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_open_clip(tmp_path: Path) -> tuple[str, Any, Path]:
    """An architecture of open_clip, a network of it, and its checkpoint in the shape that HPSv2 has."""
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "small-scorer.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-scorer.json")
    torch.manual_seed(1)
    model = open_clip.create_model("small-scorer").eval()
    file = tmp_path / preference.HPSV2
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, file)
    return "small-scorer", model, file


def test_hpsv2_is_the_cosine_of_its_clip(small_open_clip: tuple[str, Any, Path]) -> None:
    import open_clip

    architecture, model, file = small_open_clip
    got = scorer("hpsv2", file, architecture=architecture)
    prepare = open_clip.image_transform(
        32, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD, resize_mode="longest"
    )
    for size in [(48, 48), (20, 60)]:
        pictures = images(3, *size)
        pixels = torch.stack([prepare(to_pil(picture)) for picture in pictures])
        tokens = open_clip.get_tokenizer(architecture)(PROMPTS)
        with torch.no_grad():
            a, b = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(got(pictures, PROMPTS), (a * b).sum(1).double(), rtol=1e-4, atol=1e-6)


def test_open_clip_keeps_the_end_of_a_long_prompt_and_counts_it(small_open_clip: tuple[str, Any, Path]) -> None:
    architecture, model, file = small_open_clip
    clip = preference.OpenClip(architecture, file, "cpu", resize="longest")
    long = "word " * 30
    assert clip.truncated(["a cat", long, "word " * 10, "word " * 11]) == 2  # ten tokens between start and end
    with torch.no_grad():
        cut = model.encode_text(clip._tokenizer(["word " * 10]))
    torch.testing.assert_close(clip.texts([long]), cut, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_architecture_is_refused(small_open_clip: tuple[str, Any, Path]) -> None:
    _, _, file = small_open_clip
    with pytest.raises(DiffAccelError, match=r"cannot be loaded as a CLIP ViT-S-32-alt"):
        scorer("hpsv2", file, architecture="ViT-S-32-alt")


# -- PickScore on transformers ----------------------------------------------------------------------------------------


@pytest.fixture(params=[49407, 2])
def small_transformers_clip(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Any, Path]:
    """A CLIP of transformers with OpenAI's vocabulary, in a folder without tokenizer or preprocessing.

    Old configurations give the end token as 2, and mean the largest.
    """
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 49408,
        "max_position_embeddings": 12,
        "bos_token_id": 49406,
        "eos_token_id": request.param,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(2)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    model.save_pretrained(tmp_path / "pick")
    return model, tmp_path / "pick"


def test_pickscore_is_the_scaled_cosine_of_its_clip(small_transformers_clip: tuple[Any, Path]) -> None:
    import open_clip

    model, folder = small_transformers_clip
    got = scorer("pickscore", folder)
    pictures = images(3, 40, 60)
    prepare = open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([prepare(to_pil(picture)) for picture in pictures])
    tokens = open_clip.SimpleTokenizer(context_length=12)(PROMPTS)
    with torch.no_grad():
        expected = model(input_ids=tokens, pixel_values=pixels).logits_per_image.diagonal()
    torch.testing.assert_close(got(pictures, PROMPTS), expected.double(), rtol=1e-4, atol=1e-5)
    assert (
        scorer("pickscore", folder / "model.safetensors")(pictures, PROMPTS).tolist() == got(pictures, PROMPTS).tolist()
    )


def test_transformers_features_do_not_depend_on_the_other_texts(small_transformers_clip: tuple[Any, Path]) -> None:
    clip = preference.TransformersClip(small_transformers_clip[1], "cpu")
    texts = ["a cat", "a small dog that runs", "word " * 30]
    alone = torch.cat([clip.texts([text]) for text in texts])
    torch.testing.assert_close(clip.texts(texts), alone, rtol=1e-5, atol=1e-6)
    assert clip.scale == pytest.approx(math.exp(2.6592), rel=1e-4)


def test_transformers_keep_the_end_of_a_long_prompt_and_count_it(small_transformers_clip: tuple[Any, Path]) -> None:
    clip = preference.TransformersClip(small_transformers_clip[1], "cpu")
    long = "word " * 30
    assert clip.truncated(["a cat", long, "word " * 10, "word " * 11]) == 2
    torch.testing.assert_close(clip.texts([long]), clip.texts(["word " * 10]), rtol=1e-5, atol=1e-6)
    other = clip.texts(["word " * 9])
    assert (clip.texts([long]) - other).abs().max() > 1e-3


def test_a_tokenizer_in_the_folder_is_used(small_transformers_clip: tuple[Any, Path]) -> None:
    from transformers import CLIPTokenizer

    model, folder = small_transformers_clip
    vocabulary = {"<|startoftext|>": 0, "a</w>": 1, "c": 3, "at</w>": 4, "cat</w>": 5, "a": 6, "t</w>": 7}
    vocabulary["<|endoftext|>"] = 49407
    CLIPTokenizer(vocab=vocabulary, merges=[("a", "t</w>"), ("c", "at</w>")]).save_pretrained(folder)
    clip = preference.TransformersClip(folder, "cpu")
    with torch.no_grad():
        expected = model.get_text_features(input_ids=torch.tensor([[0, 1, 5, 49407]])).pooler_output
    torch.testing.assert_close(clip.texts(["a cat"]), expected, rtol=1e-5, atol=1e-6)
    assert clip.truncated(["a cat " * 5, "a cat " * 6]) == 1


@pytest.mark.slow
def test_a_folder_that_is_no_clip_is_refused(small_transformers_clip: tuple[Any, Path]) -> None:
    _, folder = small_transformers_clip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    with pytest.raises(DiffAccelError, match=r"pick' cannot be loaded as a CLIP of transformers"):
        scorer("pickscore", folder)
    config["text_config"]["vocab_size"] = 100
    from transformers import CLIPConfig, CLIPModel

    CLIPModel(CLIPConfig(**config)).save_pretrained(folder)
    with pytest.raises(DiffAccelError, match="has no tokenizer, and its vocabulary of 100 is not"):
        scorer("pickscore", folder)


# -- ImageReward ------------------------------------------------------------------------------------------------------


def test_image_reward_goes_through_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / preference.IMAGE_REWARD
    file.write_bytes(b"weights")
    with pytest.raises(weights.MissingWeights, match=preference.MED_CONFIG):
        scorer("image-reward", file)
    (tmp_path / preference.MED_CONFIG).write_text("{}")
    with pytest.raises(DiffAccelError, match=r"needs the package ImageReward, .* pip install image-reward"):
        scorer("image-reward", tmp_path)
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        print("load checkpoint")
        asked.update(name=name, **options)
        return SimpleNamespace(score=lambda prompt, image: len(prompt) + image.getpixel((0, 0))[0] / 256)

    package = ModuleType("ImageReward")
    package.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    got = scorer("image-reward", tmp_path)
    assert asked == {"name": str(file), "device": "cpu", "med_config": str(tmp_path / preference.MED_CONFIG)}
    expected = [len(prompt) + int(image[0, 0, 0]) / 256 for prompt, image in zip(PROMPTS, images(), strict=True)]
    assert got(images(), PROMPTS).tolist() == expected
    assert capsys.readouterr().out == ""  # results alone go there
    package.load = lambda *_, **__: 1 / 0  # type: ignore[attr-defined]
    with pytest.raises(DiffAccelError, match=r"ImageReward cannot load '.*ImageReward.pt' \(ZeroDivisionError"):
        scorer("image-reward", tmp_path)


@pytest.mark.slow
def test_networks_are_imported_only_when_asked_for() -> None:
    heavy = "{'open_clip', 'transformers', 'timm', 'torchmetrics', 'torchvision', 'ImageReward'}"
    ours = "diffaccel.eval.networks.scorers, diffaccel.eval.networks.lpips"
    code = f"import {ours}, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
