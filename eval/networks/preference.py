"""Published preference scorers, built from their checkpoints; only ImageReward needs its own package.

Each builder takes ``(path, device)`` and returns a function ``(images, prompts) -> (B,)``.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.eval.metrics.clip_score import pooled, prompt_cosine
from diffaccel.eval.networks import weights
from diffaccel.eval.networks.extractors.base import exact_float32, frozen
from diffaccel.eval.networks.resize import to_pil

AESTHETIC = "sac+logos+ava1-l14-linearMSE.pth"
OPEN_CLIP = "open_clip_model.safetensors"
OPENAI_L14 = "timm/vit_large_patch14_clip_224.openai"
HPSV2 = "HPS_v2.1_compressed.pt"
PICKSCORE = "model.safetensors"
IMAGE_REWARD, MED_CONFIG = "ImageReward.pt", "med_config.json"
HPSV2_HUB, PICKSCORE_HUB, IMAGE_REWARD_HUB = "xswu/HPSv2", "yuvalkirstain/PickScore_v1", "THUDM/ImageReward"

WeightsPath = str | Path | None
Device = str | torch.device
Function = Callable[[Tensor, Sequence[str]], Tensor]
_BATCH = 16


# -- LAION aesthetic --------------------------------------------------------------------------------------------------


def aesthetic(
    path: WeightsPath,
    device: Device,
    *,
    clip: Callable[[Tensor], Any] | None = None,
    architecture: str = "ViT-L-14-quickgelu",
) -> Function:
    """Build LAION's aesthetic score v2, about 1 to 10: a linear head on L2-normalised features of OpenAI's ViT-L/14.

    Prompts are ignored.

    Args:
        path: the head's file, or a folder with it and OpenAI's ViT-L/14 as ``open_clip_model.safetensors``.
        device: device of both networks.
        clip: another source of the features, such as an extractor.
        architecture: architecture of the CLIP in that file; OpenAI's was trained with QuickGELU.
    """
    file = weights.find(AESTHETIC, path)
    if clip is None:
        folder = file.parent if path is not None and Path(path).expanduser().is_dir() else None
        checkpoint = weights.find(OPEN_CLIP, folder, hub=OPENAI_L14)
        clip = OpenClip(architecture, checkpoint, device, resize="shortest")
    features, head = clip, linear_head(weights.load(file), device)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.cat([head(pooled(features(part))) for part in images.split(_BATCH)])

    return score


def linear_head(state: Mapping[str, Tensor], device: Device = "cpu") -> Callable[[Tensor], Tensor]:
    """Build a chain of linear layers on L2-normalised features, ``(B, d) -> (B,)``.

    The state dict has ``layers.<i>.weight`` and ``layers.<i>.bias``. LAION's layers are 768-1024-128-64-16-1, without
    activations between them.

    Raises:
        DiffAccelError: for missing layers, layers whose sizes do not match, and features of another size.
    """
    matches = (re.fullmatch(r"layers\.(\d+)\.weight", name) for name in state)
    indices = sorted(int(match[1]) for match in matches if match)
    target = torch.device(device)
    layers = [
        (state[f"layers.{i}.weight"].to(target, torch.float32), state[f"layers.{i}.bias"].to(target, torch.float32))
        for i in indices
        if f"layers.{i}.bias" in state
    ]
    if not (
        indices
        and len(layers) == len(indices)
        and all(weight.ndim == 2 and bias.shape == weight.shape[:1] for weight, bias in layers)
        and all(before.shape[0] == after.shape[1] for (before, _), (after, _) in pairwise(layers))
        and len(layers[-1][0]) == 1
    ):
        sizes = ", ".join(f"{i}: {tuple(state[f'layers.{i}.weight'].shape)}" for i in indices)
        raise DiffAccelError(
            f"These are not the weights of a linear head from features to a score; layers: {sizes or 'none'}."
        )
    size = layers[0][0].shape[1]

    @torch.no_grad()
    def score(features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != size:
            raise DiffAccelError(f"The head takes features (B, {size}); got {tuple(features.shape)}.")
        x = F.normalize(features.to(target, torch.float32), dim=1)
        with exact_float32(target):
            for weight, bias in layers:
                x = F.linear(x, weight, bias)
        return x[:, 0]

    return score


# -- CLIPs trained on human choices -----------------------------------------------------------------------------------


def hpsv2(path: WeightsPath, device: Device, *, architecture: str = "ViT-H-14") -> Function:
    """Build HPS v2.1: the cosine of a fine-tuned ViT-H/14, without its scale (arXiv 2306.09341).

    An image is resized by its longer side and padded with black; for square images this is the usual resizing.
    """
    file = weights.find(HPSV2, path, hub=HPSV2_HUB)
    clip = OpenClip(architecture, file, device, resize="longest")
    return lambda images, prompts: prompt_cosine(clip, images, prompts, batch=_BATCH)


def pickscore(path: WeightsPath, device: Device) -> Function:
    """Build PickScore: the cosine of a fine-tuned ViT-H/14 times its scale, ``exp(s) cos`` (arXiv 2305.01569).

    ``path`` is the folder of a CLIP of transformers (``config.json``, ``model.safetensors``); if it has no tokenizer or
    preprocessing, those of OpenAI's CLIP are used.
    """
    clip = TransformersClip(weights.find(PICKSCORE, path, hub=PICKSCORE_HUB).parent, device)
    return lambda images, prompts: clip.scale * prompt_cosine(clip, images, prompts, batch=_BATCH)


class OpenClip:
    """CLIP of open_clip from a checkpoint.

    ``resize`` is "shortest", to resize by the shorter side and crop the centre, or "longest", to resize by the longer
    side and pad with black.
    """

    def __init__(self, architecture: str, file: Path, device: Device, *, resize: str) -> None:
        import open_clip

        self.name, self._device = f"{architecture}/{file.name}", torch.device(device)
        try:
            model = open_clip.create_model(architecture, pretrained=str(file), require_pretrained=True)
        except Exception as error:  # the loader raises many kinds
            raise DiffAccelError(
                f"'{file}' cannot be loaded as a CLIP {architecture} ({first_line(error)})."
            ) from error
        self._model: Any = frozen(model, self._device)
        self._tokenizer = open_clip.get_tokenizer(architecture)
        config = model.visual.preprocess_cfg
        self._prepare = open_clip.image_transform(
            config["size"], is_train=False, mean=config["mean"], std=config["std"], resize_mode=resize
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute image features ``(B, d)`` of uint8 images ``(B, 3, H, W)``."""
        pixels = torch.stack([self._prepare(to_pil(image)) for image in images.cpu()])
        with exact_float32(self._device):
            return self._model.encode_image(pixels.to(self._device))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Compute text features ``(n, d)``."""
        with exact_float32(self._device):
            return self._model.encode_text(self._tokenizer(texts).to(self._device))

    def truncated(self, texts: list[str]) -> int:
        """Count the texts that are longer than the network's context."""
        return sum(len(self._tokenizer.encode(text)) + 2 > self._tokenizer.context_length for text in texts)


class TransformersClip:
    """CLIP of transformers from a local folder.

    Attributes:
        scale: ``exp(logit_scale)``, the factor of cosines.
    """

    def __init__(self, folder: Path, device: Device) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel

        self.name, self._device = folder.name, torch.device(device)
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the loader raises many kinds
            raise DiffAccelError(
                f"'{folder}' cannot be loaded as a CLIP of transformers ({first_line(error)})."
            ) from error
        self._model: Any = frozen(model, self._device)
        self.scale = float(model.logit_scale.exp())
        self._length = model.config.text_config.max_position_embeddings
        self._tokenize = _tokenizer(folder, model.config.text_config.vocab_size, self._length)
        size = model.config.vision_config.image_size
        if (folder / "preprocessor_config.json").is_file():
            self._prepare = CLIPImageProcessorPil.from_pretrained(folder)
        else:
            self._prepare = CLIPImageProcessorPil(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute image features ``(B, d)`` of uint8 images ``(B, 3, H, W)``."""
        pixels = self._prepare([to_pil(image) for image in images.cpu()], return_tensors="pt")["pixel_values"]
        with exact_float32(self._device):
            return pooled(self._model.get_image_features(pixel_values=pixels.to(self._device)))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Compute text features ``(n, d)``."""
        rows = [self._tokenize(text)[0] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=self._device)
        # padding follows the end token: the feature is read at that token, which attends to earlier tokens only
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self._device)
        with exact_float32(self._device):
            return pooled(self._model.get_text_features(input_ids=ids, attention_mask=mask))

    def truncated(self, texts: list[str]) -> int:
        """Count the texts that are longer than the network's context."""
        return sum(self._tokenize(text)[1] > self._length for text in texts)


def _tokenizer(folder: Path, vocabulary: int, length: int) -> Callable[[str], tuple[list[int], int]]:
    """Build a tokenizer from a text to its ids, truncated but for the end token, and their number before that."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

        def encode(text: str) -> list[int]:
            return tokenizer(text, verbose=False)["input_ids"]
    else:
        import open_clip

        openai = open_clip.SimpleTokenizer(context_length=length)
        if vocabulary != openai.vocab_size:
            raise DiffAccelError(
                f"'{folder}' has no tokenizer, and its vocabulary of {vocabulary} is not that of OpenAI's CLIP."
            )

        def encode(text: str) -> list[int]:
            return [openai.sot_token_id, *openai.encode(text), openai.eot_token_id]

    def tokenize(text: str) -> tuple[list[int], int]:
        ids = encode(text)
        return (ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]), len(ids)

    return tokenize


# -- ImageReward ------------------------------------------------------------------------------------------------------


PACKAGE = "ImageReward"  # no optional dependency of this package, because it pins versions that are years old


def image_reward(path: WeightsPath, device: Device) -> Function:
    """Build ImageReward (arXiv 2304.05977) by its own package, the only one with its BLIP.

    ``path`` is ``ImageReward.pt`` with ``med_config.json`` beside it, or their folder.
    """
    file = weights.find(IMAGE_REWARD, path, hub=IMAGE_REWARD_HUB)
    config = weights.find(MED_CONFIG, file.parent)
    try:
        package: Any = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise DiffAccelError(
            f"The scorer 'image-reward' needs the package ImageReward, which cannot be imported ({error}). "
            "Install it: pip install image-reward; or take hpsv2, pickscore or aesthetic."
        ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the package prints, and stdout is for results
            model = package.load(str(file), device=str(device), med_config=str(config))
    except Exception as error:  # the loader raises many kinds
        raise DiffAccelError(f"ImageReward cannot load '{file}' ({type(error).__name__}: {error}).") from error

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs = zip(images.cpu(), prompts, strict=True)
        return torch.tensor([float(model.score(prompt, to_pil(image))) for image, prompt in pairs], dtype=torch.float64)

    return score
