"""CLIP models of open_clip: projected image and text features (arXiv 2103.00020).

A checkpoint file does not record the activation of its network, GELU or the QuickGELU of OpenAI's models, and with the
wrong one it loads silently and gives other features. So the name has to say it: ``ViT-L-14-quickgelu`` or
``ViT-L-14-gelu``. A folder with ``open_clip_config.json`` and the tag of a published model imply it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError, first_line, unknown
from diffaccel.eval.networks import resize, weights
from diffaccel.eval.networks.extractors.base import Extractor, exact_float32, frozen
from diffaccel.eval.networks.extractors.transforms import normalise, split
from diffaccel.files import sha256

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
LOCAL = "local-dir:"
QUICK, PLAIN = "-quickgelu", "-gelu"
OWN, STRETCHED = "own", "torch-bicubic"
_TEXTS = 256  # per forward pass
_LONGEST = 4096  # tokens of a caption that is not truncated


@dataclass(kw_only=True)
class ClipExtractor(Extractor):
    """Extractor of projected image features, not normalised, and of text features in the same space."""

    clip: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)

    def normalised(self, images: Tensor) -> Tensor:
        """Compute image features of length 1, ``(B, dim)``."""
        return F.normalize(self(images), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Compute text features, not normalised, ``(n, dim)`` float32 on the CPU.

        Truncated captions keep their end token.
        """
        features = [torch.empty(0, self.dim)]
        with torch.no_grad(), exact_float32(self.device):
            for start in range(0, len(texts), _TEXTS):
                tokens = self.tokenizer(list(texts[start : start + _TEXTS])).to(self.device)
                features.append(self.clip.encode_text(tokens).to("cpu", torch.float32))  # type: ignore[operator]
        return torch.cat(features)

    def truncated(self, texts: Sequence[str]) -> int:
        """Count the captions that have more tokens than the network's context."""
        count = 0
        for start in range(0, len(texts), _TEXTS):
            batch = list(texts[start : start + _TEXTS])
            tokens, whole = self.tokenizer(batch), self.tokenizer(batch, context_length=_LONGEST)
            count += int((tokens != whole[:, : tokens.shape[1]]).any(1).sum())  # truncation moves the end token
        return count


def clip(
    architecture: str,
    weight: str,
    *,
    preprocessing: str = OWN,
    protocol: str = OWN,
    device: str | torch.device = "cpu",
) -> ClipExtractor:
    """Build a CLIP of an architecture that open_clip knows.

    Args:
        architecture: such as ``ViT-B-16-SigLIP``; with ``-quickgelu`` or ``-gelu`` where there are both.
        weight: a safetensors or torch file, or a tag of open_clip such as ``openai``, searched for in the hub's cache.
        preprocessing: "own", the model's by Pillow, to the bit; or "torch-bicubic", stretched on the device (CMMD).
        protocol: name of the protocol in keys, or "own".
        device: device of the network.

    Raises:
        MissingWeights: for a file that does not exist.
        DiffAccelError: for an unknown architecture, an ambiguous activation, and weights of another architecture.
    """
    import open_clip

    base = architecture.removesuffix(QUICK).removesuffix(PLAIN)
    known = open_clip.list_models()
    published = open_clip.get_pretrained_cfg(base, weight) if base in known else None
    if published:
        hub = published.get("hf_hub", "").rstrip("/")
        file = weights.find(WEIGHTS, hub=hub, elsewhere=False, flag=f"open_clip:{architecture}:/path")
        name, label = base, f"{base}/{weight}"
        options = _published_options(published)
    else:
        name = _checked_architecture(architecture, known)
        file = weights.find(Path(weight).name, weight, flag=f"open_clip:{architecture}:/path")
        label = f"{architecture}/{file.stem}@{sha256(file)[:8]}"
        options = {}
    return _build(name, file, label, preprocessing, protocol, torch.device(device), pretrained=str(file), **options)


def _published_options(published: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing and the activation of a published model as arguments of ``open_clip.create_model``."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {
        "force_preprocess_cfg": {key: published[key] for key in keys if key in published},
        "force_quick_gelu": bool(published.get("quick_gelu")),
    }


def _checked_architecture(architecture: str, known: Sequence[str]) -> str:
    """Return open_clip's name of an architecture; refuse unknown ones and those that leave the activation open."""
    name = architecture.removesuffix(PLAIN)
    if name not in known:
        raise unknown("open_clip architecture", name, known)
    if name == architecture and f"{name}{QUICK}" in known:
        raise DiffAccelError(
            f"open_clip has '{name}' with two activations, and a checkpoint does not tell which one it needs. Say "
            f"'{name}{QUICK}' (OpenAI's weights, among others) or '{name}{PLAIN}'."
        )
    return name


def clip_folder(
    folder: Path,
    *,
    name: str = "",
    preprocessing: str = OWN,
    protocol: str = OWN,
    device: str | torch.device = "cpu",
) -> ClipExtractor:
    """Build the CLIP of a folder in open_clip's layout: its config, its weights and, if it has its own, its tokenizer.

    Raises:
        MissingWeights: for a folder without weights.
        DiffAccelError: for a folder without a config, for several weight files of which none has the usual name, and
            for weights of another architecture.
    """
    if not (folder / CONFIG).is_file():
        raise DiffAccelError(f"'{folder}' holds no {CONFIG}. Give a folder in open_clip's layout.")
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
    chosen = [file for file in files if file.name == WEIGHTS] or files
    if len(chosen) > 1:
        raise DiffAccelError(f"'{folder}' holds several files of weights; name the one to use {WEIGHTS}.")
    file = chosen[0] if chosen else weights.find(WEIGHTS, folder)
    label = name or folder.resolve().name
    return _build(f"{LOCAL}{folder}", file, label, preprocessing, protocol, torch.device(device))


def _build(
    source: str, file: Path, label: str, preprocessing: str, protocol: str, device: torch.device, **options: Any
) -> ClipExtractor:
    """Build the extractor of the model ``source``; ``options`` are arguments of ``open_clip.create_model``."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if preprocessing not in (OWN, STRETCHED):
        raise unknown("preprocessing of CLIP", preprocessing, (OWN, STRETCHED))
    try:
        model = open_clip.create_model(source, require_pretrained=True, weights_only=True, **options)
        tokenizer = open_clip.get_tokenizer(source)
        dim = int(open_clip.get_model_config(source)["embed_dim"])
    except Exception as error:  # open_clip's loaders raise many kinds
        raise DiffAccelError(
            f"'{file}' cannot be loaded as the CLIP '{source}' ({first_line(error, 300)}). "
            "Give a state dict of that architecture."
        ) from error
    config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    prepare, scale = split(image_transform_v2(config, is_train=False), (height, width))
    frozen(model, device)

    def stretched(x: Tensor) -> Tensor:
        return normalise(config.mean, config.std)(
            255 * resize.torch_bicubic(x.to(torch.float32) / 255, (height, width), antialias=False)
        )

    own = preprocessing == OWN
    image = scale if own else stretched
    suffix = "" if protocol == OWN else f"[{protocol}]"
    return ClipExtractor(
        name=label, key=f"FD-clip[{label}]{suffix}", dim=dim, weights_sha256=sha256(file), official=False,
        protocol=protocol, device=device, module=model, clip=model, tokenizer=tokenizer,
        prepare=prepare if own else None, network=lambda x: model.encode_image(image(x)),
    )  # fmt: skip
