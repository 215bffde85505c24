"""CLIPs: the activation is said, preprocessing is to the bit, captions that are cut are counted and keep their end."""

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
from diffaccel.eval.networks import weights
from diffaccel.eval.networks.extractors import as_clip, clips, extractor
from diffaccel.eval.networks.extractors.transforms import split
from diffaccel.files import sha256


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture
def architectures(monkeypatch) -> None:
    known = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(known, "small", copy.deepcopy(SMALL))
    monkeypatch.setitem(known, "small-quickgelu", {**copy.deepcopy(SMALL), "quick_gelu": True})
    monkeypatch.setitem(known, "single", copy.deepcopy(SMALL))


@pytest.fixture
def clip_file(architectures, tmp_path) -> Path:
    torch.manual_seed(0)
    save_file(open_clip.create_model("small").state_dict(), tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def test_the_activation_of_a_clip_is_said_not_guessed(clip_file, tmp_path):
    with pytest.raises(DiffAccelError, match=r"two activations.*Say 'small-quickgelu' .* or 'small-gelu'"):
        extractor(f"open_clip:small:{clip_file}")
    images = pixels(2, 3, 32, 32)
    quick, exact = (extractor(f"open_clip:small-{name}:{clip_file}") for name in ("quickgelu", "gelu"))
    assert not torch.allclose(quick(images), exact(images), atol=1e-3)
    torch.manual_seed(0)
    ours = open_clip.create_model("small").eval()  # the weights of the file
    assert torch.allclose(exact(images), ours.encode_image(((images / 255) - mean()) / std()), atol=1e-5)
    assert exact.key == f"FD-clip[small-gelu/mine@{sha256(clip_file)[:8]}]" and not exact.official
    assert torch.equal(extractor(f"open_clip:single:{clip_file}")(images), exact(images))  # nothing to say
    with pytest.raises(DiffAccelError, match=r"Unknown open_clip architecture 'smal'. Did you mean 'small'"):
        extractor(f"open_clip:smal:{clip_file}")
    torch.save({"visual.proj": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(DiffAccelError, match=r"'.*other.pt' cannot be loaded as the CLIP 'single'"):
        extractor(f"open_clip:single:{tmp_path / 'other.pt'}")


def mean() -> Tensor:
    return torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)


def std() -> Tensor:
    return torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)


def test_a_published_tag_is_found_in_the_hubs_cache_with_its_activation(clip_file, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--timm--some.openai" / "snapshots" / ("f" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--timm--some.openai" / "refs").mkdir()
    (tmp_path / "models--timm--some.openai" / "refs" / "main").write_text("f" * 40)
    (snapshot / "open_clip_model.safetensors").write_bytes(clip_file.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = {"hf_hub": "timm/some.openai/", "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", {"openai": config})
    found = extractor("open_clip:small:openai")
    assert found.key == "FD-clip[small/openai]"
    torch.manual_seed(0)
    model = open_clip.create_model("small", force_quick_gelu=True).eval()
    images = pixels(2, 3, 32, 32)
    assert torch.allclose(found(images), model.encode_image((images / 255 - 0.5) / 0.25), atol=1e-5)


def test_a_folder_without_weights_is_not_a_random_clip(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    with pytest.raises(weights.MissingWeights, match=r"open_clip_model\.safetensors"):
        extractor(f"open_clip:local-dir:{tmp_path}")
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(DiffAccelError, match="several files of weights"):
        extractor(f"open_clip:local-dir:{tmp_path}")


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_open_clips_to_the_bit(mode, interpolation):
    config = PreprocessCfg(size=32, resize_mode=mode, interpolation=interpolation, fill_color=7)
    transform = image_transform_v2(config, is_train=False)
    prepare, normalise = split(transform, (32, 32))
    for i, size in enumerate([(32, 32), (40, 57), (90, 33), (20, 20), (32, 48)]):
        image = pixels(3, *size, seed=i)
        prepared = prepare(image)
        assert prepared.dtype == torch.uint8 and torch.equal(normalise(prepared[None])[0], transform(pillow(image)))


def test_cmmd_stretches_on_the_device(clip_file):
    found = extractor(f"open_clip:single:{clip_file}", protocol="cmmd")
    images = pixels(2, 3, 48, 80)
    stretched = torch.nn.functional.interpolate(images.float() / 255, (32, 32), mode="bicubic")
    expected = found.clip.encode_image((stretched - mean()) / std())
    assert torch.allclose(found(images), expected, atol=1e-5) and found.key.endswith("[cmmd]") and found.prepare is None
    assert torch.allclose(found.normalised(images).norm(dim=1), torch.ones(2), atol=1e-6)


@pytest.fixture(scope="module")
def judge():
    return as_clip(extractor("emoji-clip-judge"))


@pytest.mark.slow
def test_the_zoos_clip_reads_pictures_and_texts(judge):
    assert judge.key == "FD-clip[emoji-clip-judge]" and "emoji-clip-judge" in clips()
    folder = f"local-dir:{zoo.path('emoji-clip-judge')}"
    model, _, transform = open_clip.create_model_and_transforms(folder, require_pretrained=True)
    image = pixels(3, 200, 150)
    expected = model.eval().encode_image(transform(pillow(image))[None])
    assert torch.allclose(judge(image[None]), expected, atol=1e-5)
    texts = ["a red apple"] * 300
    assert judge.texts(texts).shape == (300, judge.dim) and judge.texts([]).shape == (0, judge.dim)
    expected = model.encode_text(open_clip.get_tokenizer(folder)(texts[:1]))
    assert torch.allclose(judge.texts(texts)[299:], expected, atol=1e-5)


def test_cut_captions_are_counted_and_keep_their_end(judge, clip_file):
    openai = extractor(f"open_clip:single:{clip_file}")
    for found in (judge, openai):
        length = found.tokenizer.context_length
        end = found.tokenizer([""])[0].max()
        fits = next(n for n in range(length, 0, -1) if found.truncated(["a " * n]) == 0)
        assert found.truncated(["a " * fits, "a " * (fits + 1), "a " * 500, ""]) == 2
        cut = found.tokenizer(["a " * 500])[0]
        assert len(cut) == length and cut[-1] == end  # the token that the text features are read at
    assert torch.equal(openai.texts(["a " * 500]), openai.texts(["a " * 600]))
