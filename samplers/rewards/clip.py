"""How well a picture fits its prompt, by a CLIP of open_clip; the whole way from pixels to number is differentiable."""

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
from diffaccel.samplers.rewards.reward import Reward

# A model of the zoo: the CLIP of its world that may be a reward. The zoo's judge is none: it only judges.
DEFAULTS = {"emoji-flux": "emoji-clip-reward"}
HOW = "clip:/folder (open_clip layout) or clip:ARCHITECTURE:/file"
_TEXTS = 4096  # features kept
_IMAGES = 256  # in one pass


def reward(argument: str, device: torch.device, model: str) -> Reward:
    """``100 cos(E_image, E_text)`` (CLIP, arXiv 2103.00020); not cut at 0, so that a bad picture has a gradient too.

    Pictures are resized on the device by torch, where the evaluation does it with Pillow: at the network's own size the
    numbers agree, elsewhere nearly.

    Args:
        argument: a CLIP of the zoo, a folder in open_clip's layout, or ``ARCHITECTURE:/file``; "" for the one that
            belongs to the model.
        device: of the network, which runs in float32.
        model: name or folder of the model that makes the pictures.

    Raises:
        MissingWeights: for weights that are not there.
        DiffAccelError: for a model without a CLIP of its own, an unknown name, and weights that do not fit.
    """
    which = argument or default(model)
    found = extractors.as_clip(extractors.extractor(_spec(which), device=device))
    network: Any = found.clip
    prepare = preprocessing(network)

    @lru_cache(_TEXTS)
    def text(prompt: str) -> Tensor:
        # one at a time, so that its features do not depend on the others; kept, so not of inference mode
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return F.normalize(network.encode_text(found.tokenizer([prompt]).to(device)), dim=1)[0]

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        texts = torch.stack([text(prompt) for prompt in prompts])
        with torch.autocast(device.type, enabled=False):
            features = F.normalize(network.encode_image(prepare(images.to(torch.float32))), dim=1)
            return 100 * (features * texts).sum(1)

    name = f"clip:{which}"
    return Reward(name=name, function=score, device=device, batch_size=_IMAGES, differentiable=True, needs_prompts=True)


def default(model: str) -> str:
    """The CLIP that belongs to a model of the zoo, by the model's name or its folder.

    Raises:
        DiffAccelError: for any other model: a CLIP that saw other pictures says nothing about these.
    """
    for name, own in DEFAULTS.items():
        if model == name or (model and Path(model).is_dir() and Path(model).resolve() == zoo.path(name).resolve()):
            return own
    got = f"'{model}'" if model else "this model"
    raise DiffAccelError(
        f"The reward 'clip' names no CLIP, and only {', '.join(DEFAULTS)} has one of its own, not {got}. "
        f"Say which: {HOW}."
    )


def preprocessing(network: Any) -> Callable[[Tensor], Tensor]:
    """What the network's ``preprocess_cfg`` says, in torch: from ``(b, 3, H, W)`` in [0, 1] to its input.

    Within a level of 255 of what open_clip makes by Pillow of smooth pictures; Pillow also rounds between its passes.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(network))
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    always_bicubic = config.resize_mode == "shortest" and height != width  # in open_clip, whatever the config says
    mode = "bilinear" if config.interpolation == "bilinear" and not always_bicubic else "bicubic"
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))

    def prepare(images: Tensor) -> Tensor:
        size = resized(images.shape[-2:], (height, width), config.resize_mode)
        if images.shape[-2:] != size:  # bicubic weights overshoot; 8-bit images cannot
            images = F.interpolate(images, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
        images = cut(images, (height, width), config.fill_color / 255)
        return (images - mean.to(images.device)) / std.to(images.device)

    return prepare


def resized(size: tuple[int, ...], target: tuple[int, int], mode: str) -> tuple[int, int]:
    """The size before :func:`cut` brings it to ``target``: "squash", or the "shortest" or "longest" side fits."""
    if mode == "squash":
        return target
    ratios = [have / want for have, want in zip(size, target, strict=True)]
    if mode == "shortest" and target[0] == target[1]:  # rounded down by torchvision, to nearest by open_clip
        height, width = (int(target[0] * side / min(size)) for side in size)
    else:
        ratio = min(ratios) if mode == "shortest" else max(ratios)
        height, width = (round(side / ratio) for side in size)
    return height, width


def cut(images: Tensor, target: tuple[int, int], fill: float) -> Tensor:
    """The centre, or the whole on a ground of ``fill``."""
    edges: list[int] = []
    for have, want in zip(reversed(images.shape[-2:]), reversed(target), strict=True):
        before = -round((have - want) / 2) if have > want else (want - have) // 2
        edges += [before, want - have - before]
    return F.pad(images, edges, value=fill) if any(edges) else images  # negative edges cut


def _spec(which: str) -> str:
    """As the evaluation's extractors are written."""
    clips = extractors.clips()
    if which in clips:
        return which
    if ":" in which:
        return f"open_clip:{which}"
    if "/" not in which and not Path(which).is_dir():
        raise unknown("CLIP", which, [*DEFAULTS.values(), *HOW.split(" or ")])  # the judge is not offered
    return f"open_clip:local-dir:{which}"
