"""Image networks of timm: DINOv2 as published Fréchet distances use it, and any other with its own preprocessing."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.networks import resize, weights
from diffaccel.eval.networks.extractors.base import Extractor, frozen
from diffaccel.eval.networks.extractors.transforms import normalise, split
from diffaccel.files import sha256

SIZE = (224, 224)
PATCH = 14
# width of the network: name in reports, name in timm
DINOV2 = {
    384: ("dinov2-vits14", "vit_small_patch14_dinov2"),
    768: ("dinov2-vitb14", "vit_base_patch14_dinov2"),
    1024: ("DINOv2", "vit_large_patch14_dinov2"),
}
PIL, TORCH = "pil-bicubic-224", "torch-bicubic-antialias-224"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_OFFSET = 0.1  # DINOv2 adds it to the grid's side before it resamples position embeddings (arXiv 2304.07193)


def dinov2(
    path: str | os.PathLike[str] | None = None,
    *,
    preprocessing: str = PIL,
    protocol: str = "dgm-dinov2",
    device: str | torch.device = "cpu",
    download: bool = False,
) -> Extractor:
    """Build DINOv2 without registers at 224x224: its normalised class token (arXiv 2306.04675: ViT-L/14, dim 1024).

    The weights are the authors' state dict or timm's; position embeddings are resampled to the 16x16 grid as in the
    authors' network, unlike in timm's loader.

    Raises:
        MissingWeights: if no file is found.
        DiffAccelError: for a file of another network.
    """
    import timm

    if preprocessing not in (PIL, TORCH):
        raise unknown("preprocessing of DINOv2", preprocessing, (PIL, TORCH))
    file = weights.find("dinov2", path, download=download, flag="--extractor dinov2:/path/to/weights.pth")
    state = weights.load(file)
    state.pop("mask_token", None)
    token, grid = state.get("cls_token"), state.get("pos_embed")
    if token is None or grid is None or token.shape[-1] not in DINOV2:
        raise DiffAccelError(
            f"'{file}' is not a DINOv2 of width {', '.join(map(str, DINOV2))} with patches of 14 pixels."
        )
    state["pos_embed"] = resample_positions(grid.to(torch.float32), SIZE[0] // PATCH)
    name, architecture = DINOV2[token.shape[-1]]
    model = timm.create_model(architecture, pretrained=False, img_size=SIZE, num_classes=0)
    _load(model, state, f"'{file}' is not a state dict of {architecture}")
    sha, device = sha256(file), torch.device(device)
    frozen(model, device)
    scale = normalise(_MEAN, _STD)

    def antialiased(x: Tensor) -> Tensor:
        return scale(resize.torch_bicubic(x.to(torch.float32), SIZE, antialias=True))

    pil = preprocessing == PIL
    return Extractor(
        name=name, key=f"FD-{name}(sha={sha[:8]})[{protocol}]", dim=token.shape[-1], weights_sha256=sha, official=False,
        protocol=protocol, device=device, module=model,
        prepare=partial(resize.pil_bicubic, size=SIZE) if pil else None,
        network=lambda x: model(scale(x) if pil else antialiased(x)),
    )  # fmt: skip


def resample_positions(embedding: Tensor, side: int) -> Tensor:
    """Resample position embeddings ``(1, 1 + n * n, d)`` to a grid of ``side`` patches, as DINOv2 does.

    Bicubic without antialiasing, with the scale ``(side + 0.1) / n`` rather than ``side / n``.
    """
    n = round((embedding.shape[1] - 1) ** 0.5)
    if n == side:
        return embedding
    token, grid = embedding[:, :1], embedding[:, 1:]
    grid = grid.unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + _OFFSET) / n, mode="bicubic")
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def timm_model(name: str, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Extractor:
    """Build any timm network: its pooled features before the classifier, with the preprocessing of its config.

    Raises:
        MissingWeights: for a file that does not exist.
        DiffAccelError: for an unknown name, and for weights that do not fit it in every layer but the classifier.
    """
    import timm

    if not timm.is_model(name):
        raise unknown("timm network", name, timm.list_models())
    file = weights.find(os.path.basename(path), path, flag=f"timm:{name}:/path")
    model = timm.create_model(name, pretrained=False, num_classes=0)
    state = weights.load(file)
    convert = getattr(sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, model)
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    _load(model, state, f"'{file}' is not a state dict of {name}")
    config = timm.data.resolve_model_data_config(model)
    prepare, scale = split(timm.data.create_transform(**config, is_training=False), tuple(config["input_size"][1:]))
    sha, device = sha256(file), torch.device(device)
    frozen(model, device)
    return Extractor(
        name=name, key=f"FD-{name}@{sha[:8]}", dim=model.num_features, weights_sha256=sha, official=False,
        device=device, module=model, prepare=prepare, network=lambda x: model(scale(x)),
    )  # fmt: skip


def _load(model: nn.Module, state: dict[str, Any], message: str) -> None:
    """Load a state dict strictly; errors start with ``message``."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise DiffAccelError(f"{message} ({reason}). Give the file of that network.") from error
