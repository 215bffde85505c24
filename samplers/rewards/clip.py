"""CLIP score of a picture and its prompt, by a model of open_clip, differentiable with respect to the pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel import zoo
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.networks import extractors
from diffaccel.samplers.rewards import identity
from diffaccel.samplers.rewards.reward import Reward

# Model of the zoo: its CLIP for rewards. The zoo's judge is not among them: it is kept for evaluation.
DEFAULTS = {"emoji-flux": "emoji-clip-reward", "emoji-flux-1step": "emoji-clip-reward"}
SYNTAX = "clip:/folder (open_clip layout) or clip:ARCHITECTURE:/file"
_CACHED_TEXTS = 4096
_BATCH_SIZE = 256


def reward(argument: str, device: torch.device, model: str) -> Reward:
    """Score by ``100 cos(E_image, E_text)`` (CLIP, arXiv 2103.00020), without the usual clamp at 0.

    So a bad picture has a gradient too. Pictures are resized on the device by torch, where the evaluation uses Pillow:
    at the network's own size the numbers agree, elsewhere nearly.

    Args:
        argument: a CLIP of the zoo, a folder in open_clip's layout, or ``ARCHITECTURE:/file``; "" for the one that
            belongs to the model.
        device: device of the network, which runs in float32.
        model: name or folder of the model that makes the pictures.

    Raises:
        MissingWeights: for weights that are not there.
        DiffAccelError: for a model without a CLIP of its own, an unknown name, and weights that do not fit.
    """
    clip_name = argument or default(model)
    extractor = extractors.as_clip(extractors.extractor(_spec(clip_name), device=device))
    network: Any = extractor.clip
    prepare = preprocessing(network)

    @lru_cache(_CACHED_TEXTS)
    def text_features(prompt: str) -> Tensor:
        # One prompt at a time, so that its features do not depend on the batch. They are cached for later graphs, which
        # tensors made in inference mode cannot enter.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return F.normalize(network.encode_text(extractor.tokenizer([prompt]).to(device)), dim=1)[0]

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        texts = torch.stack([text_features(prompt) for prompt in prompts])
        with torch.autocast(device.type, enabled=False):
            features = F.normalize(network.encode_image(prepare(images.to(torch.float32))), dim=1)
            return 100 * (features * texts).sum(1)

    return Reward(
        name=f"clip:{clip_name}", function=score, device=device, batch_size=_BATCH_SIZE, differentiable=True,
        needs_prompts=True, identity=lambda: identity.weights(network),
    )  # fmt: skip


def default(model: str) -> str:
    """Return the name of the CLIP that belongs to a model of the zoo, by the model's name or its folder.

    Raises:
        DiffAccelError: for any other model: a CLIP trained on other pictures says nothing about these.
    """
    if clip_name := DEFAULTS.get(zoo.name_of(model)):
        return clip_name
    got = f"'{model}'" if model else "this model"
    raise DiffAccelError(
        f"The reward 'clip' names no CLIP, and only {' and '.join(DEFAULTS)} have one of their own, not {got}. "
        f"Say which: {SYNTAX}."
    )


def preprocessing(network: Any) -> Callable[[Tensor], Tensor]:
    """Return the preprocessing of a network's ``preprocess_cfg``, in torch, from ``(b, 3, H, W)`` in [0, 1].

    On smooth pictures it is within one level of 255 of open_clip's, which uses Pillow; Pillow also rounds between its
    two passes.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(network))
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    always_bicubic = config.resize_mode == "shortest" and height != width  # as open_clip does, whatever the config says
    mode = "bilinear" if config.interpolation == "bilinear" and not always_bicubic else "bicubic"
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1) for values in (config.mean, config.std)
    )

    def prepare(images: Tensor) -> Tensor:
        size = resized_size(images.shape[-2:], (height, width), config.resize_mode)
        if images.shape[-2:] != size:  # bicubic weights overshoot; 8-bit images cannot
            images = F.interpolate(images, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
        images = crop_or_pad(images, (height, width), config.fill_color / 255)
        return (images - mean.to(images.device)) / std.to(images.device)

    return prepare


def resized_size(size: tuple[int, ...], target: tuple[int, int], mode: str) -> tuple[int, int]:
    """Return the size to resize to, before :func:`crop_or_pad` brings it to ``target``.

    Args:
        size, target: ``(height, width)``.
        mode: "squash" to the target, or keep the aspect ratio so that the "shortest" or "longest" side fits it.
    """
    if mode == "squash":
        return target
    ratios = [side / wanted for side, wanted in zip(size, target, strict=True)]
    if mode == "shortest" and target[0] == target[1]:  # torchvision rounds down, open_clip to nearest
        height, width = (int(target[0] * side / min(size)) for side in size)
    else:
        ratio = min(ratios) if mode == "shortest" else max(ratios)
        height, width = (round(side / ratio) for side in size)
    return height, width


def crop_or_pad(images: Tensor, target: tuple[int, int], fill: float) -> Tensor:
    """Crop to the centre, or pad with ``fill``, each side to ``target`` (height, width)."""
    edges: list[int] = []
    for side, wanted in zip(reversed(images.shape[-2:]), reversed(target), strict=True):
        before = -round((side - wanted) / 2) if side > wanted else (wanted - side) // 2
        edges += [before, wanted - side - before]
    return F.pad(images, edges, value=fill) if any(edges) else images  # negative edges crop


def _spec(clip_name: str) -> str:
    """Return the specification by which the evaluation's extractors know a CLIP."""
    if clip_name in extractors.clips():
        return clip_name
    if ":" in clip_name:
        return f"open_clip:{clip_name}"
    if "/" not in clip_name and not Path(clip_name).is_dir():
        offered = [*dict.fromkeys(DEFAULTS.values()), *SYNTAX.split(" or ")]  # without the judge
        raise unknown("CLIP", clip_name, offered)
    return f"open_clip:local-dir:{clip_name}"
