"""A CLIP in open_clip's layout as an extractor of pictures, which also reads texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffaccel import record
from diffaccel.eval.extractors.base import Extractor, frozen

_TEXTS = 256  # in one call
_LONGEST = 4096  # tokens of a text that is not cut


@dataclass(kw_only=True)
class ClipExtractor(Extractor):
    """Features before normalisation, of pictures and of texts."""

    tokenizer: Callable[..., Tensor] = field(repr=False)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features ``(n, dim)`` float32 of texts, on the CPU."""
        model: Any = self.module
        parts = [list(texts[i : i + _TEXTS]) for i in range(0, len(texts), _TEXTS)]
        with torch.no_grad():
            return torch.cat([model.encode_text(self.tokenizer(p).to(self.device)).float().cpu() for p in parts])

    def truncated(self, texts: Sequence[str]) -> int:
        """How many texts are longer than the model reads; open_clip keeps the end token of a text that it cuts."""
        cut = 0
        for text in texts:
            read = self.tokenizer([text])[0]
            whole = self.tokenizer([text], context_length=_LONGEST)[0]
            cut += not torch.equal(read, whole[: len(read)])  # a text that is cut gets its end token early
        return cut


def clip(folder: Path, *, name: str, device: torch.device) -> ClipExtractor:
    """The CLIP in a folder with ``open_clip_config.json``; pictures go through its own preprocessing, exactly."""
    import open_clip

    where = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(where, require_pretrained=True)
    weights = next(path for path in sorted(folder.glob("open_clip_model.*")))
    sha = record.sha256(weights)
    module: Any = frozen(model, device)

    def prepare(image: Tensor) -> Tensor:
        return transform(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))

    size = module.visual.image_size
    side = size if isinstance(size, int) else size[0]
    with torch.no_grad():
        dim = module.encode_image(torch.zeros(1, 3, side, side, device=device)).shape[1]
    return ClipExtractor(
        name=name, key=f"FD-clip[{name}]", dim=dim, weights_sha256=sha, official=False, network=module.encode_image,
        prepare=prepare, device=device, module=module, tokenizer=open_clip.get_tokenizer(where),
    )  # fmt: skip
