"""What to generate: a request, checked before anything is loaded.

Image ``id`` of a request shows prompt ``id // num`` and is drawn from a CPU generator seeded with ``seed + id``: it
depends on its own seed alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import record, zoo
from diffaccel.errors import DiffAccelError, size_text, unknown
from diffaccel.runs.threads import check_threads

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
WAY = ("model", "methods", "steps", "size", "guidance", "negative")  # settings of how, not what, is drawn
_VERSIONED = ("diffaccel", "torch", "diffusers", "transformers")  # packages whose version may change bits


@dataclass(frozen=True)
class Item:
    """One image or video: its number, its prompt or class (None for a model that takes none), its generator's seed."""

    id: int
    prompt: str | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides the pixels of a run.

    Args:
        prompts: what to draw; ``num`` images of each. Empty for a pipeline that draws from classes or from noise alone.
        classes: numbers or names of classes to draw, for a pipeline that draws from classes; an error for any other.
        model: a name of the zoo, a local folder, or ``owner/name`` on the hub.
        seed: image ``id`` uses ``seed + id``.
        methods: configs to accelerate the pipeline with; none is the plain pipeline.
        steps, size, guidance, negative: None leaves the model's own default; ``size`` is (height, width) in pixels.
        frames, fps: of a video; None leaves the model's own.
        batch: images in one pipeline call. It is part of the result, since rounding in kernels depends on the shape.
        dtype: "auto" is float32 on a CPU and bfloat16 elsewhere.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        threads: of a CPU run; 0 leaves torch's own number. They change how sums are split, and so the last bits.
        latents: keep the decoder's input as well, one safetensors file per image.
    """

    prompts: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    model: str = zoo.DEFAULT
    num: int = 1
    seed: int = 0
    methods: tuple[Any, ...] = ()
    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    negative: str | None = None
    frames: int | None = None
    fps: float | None = None
    batch: int = 1
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    latents: bool = False

    def __post_init__(self) -> None:
        for name in ("prompts", "classes"):
            if isinstance(getattr(self, name), str):
                raise DiffAccelError(f"{name} is one text; it must be a tuple of texts. Write ({name[:-1]},).")
        if self.prompts and self.classes:
            raise DiffAccelError(f"Got a prompt and a class, '{self.prompts[0]}' and '{self.classes[0]}'. Give one.")
        for number, prompt in enumerate(self.prompts, 1):
            if not prompt.strip():
                raise DiffAccelError(f"Prompt {number} is empty. Say what to draw, or leave it out.")
        for name, text in self._texts():
            if not text.isascii() and not _is_unicode(text):
                raise DiffAccelError(
                    f"{name} is {text!a}, which holds half a surrogate pair or a byte that is no UTF-8. Write it "
                    "in UTF-8."
                )
        for name, least in (("num", 1), ("batch", 1), ("seed", 0), ("steps", 1), ("frames", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DiffAccelError(f"{name} is {value}; it must be at least {least}.")
        check_threads(self.threads, "threads")
        if self.size is not None and min(self.size) < 1:
            raise DiffAccelError(f"size is {size_text(*self.size)}; both sides must be at least 1 pixel.")
        if self.seed + len(self) > 2**63:
            raise DiffAccelError(f"seed is {self.seed}; it must be below 2**63 for every image.")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise DiffAccelError(f"guidance is {self.guidance}; it must be 0 or more, and 1 switches it off.")
        if self.fps is not None and not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            raise DiffAccelError(f"fps is {self.fps}; it must be above 0 and at most 1000 frames a second.")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)

    def _texts(self) -> list[tuple[str, str]]:
        """Return the texts of the request, each with its name in messages."""
        texts = [(f"Prompt {number}", text) for number, text in enumerate(self.prompts, 1)]
        texts += [("A class", text) for text in self.classes]
        return texts if self.negative is None else [*texts, ("The negative prompt", self.negative)]

    @property
    def subjects(self) -> tuple[str | None, ...]:
        """The prompts or classes to draw, or one None."""
        return self.prompts or self.classes or (None,)

    def __len__(self) -> int:
        return len(self.subjects) * self.num

    def items(self) -> list[Item]:
        """Return the images in the order of their ids: all of the first prompt, then all of the second."""
        return [Item(i, self.subjects[i // self.num], self.seed + i) for i in range(len(self))]

    def chunks(self) -> list[list[Item]]:
        """Return the images of each pipeline call, consecutive and independent of the number of processes."""
        items = self.items()
        return [items[i : i + self.batch] for i in range(0, len(items), self.batch)]

    def with_model_defaults(self) -> Request:
        """Return the request with the recommendations of a zoo model's card in place of None."""
        if self.model not in zoo.names():
            return self
        defaults = zoo.call_defaults(self.model)
        has_size = {"height", "width"} <= defaults.keys()
        recommended: dict[str, Any] = {
            "steps": defaults.get("num_inference_steps"),
            "guidance": defaults.get("true_cfg_scale", defaults.get("guidance_scale")),
            "size": (defaults["height"], defaults["width"]) if has_size else None,
        }
        return replace(self, **{key: value for key, value in recommended.items() if getattr(self, key) is None})

    def settings(self, digest: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return everything that decides the result as JSON: the request, the model's digest and package versions.

        Args:
            digest: of the model's weights.
            device: that the run computes on.
            dtype: that it computes in.
        """
        import torch

        versions = {name: version for name, version in record.versions().items() if name in _VERSIONED}
        model = Path(self.model).name if Path(self.model).is_dir() and self.model not in zoo.names() else self.model
        settings: dict[str, Any] = {
            "model": model,
            "model_digest": digest,
            "prompts": list(self.prompts),
            "num": self.num,
            "seed": self.seed,
            "methods": [config.to_dict() for config in self.methods],
            "steps": self.steps,
            "size": list(self.size) if self.size else None,
            "guidance": self.guidance,
            "negative": self.negative,
            "batch": self.batch,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "versions": versions,
        }
        optional = {"classes": self.classes, "frames": self.frames, "fps": self.fps, "latents": self.latents}
        settings |= {name: value for name, value in optional.items() if value}  # absent: older runs stay the same runs
        if device.type == "cpu":
            settings["threads"] = self.threads or torch.get_num_threads()
        return json.loads(json.dumps(settings))  # as it will be read back: tuples become lists


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written: a lone surrogate, as shells make of a byte that is no UTF-8, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
