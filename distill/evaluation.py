"""Pictures of a run while it trains: a judge's score and a Fréchet distance, beside those of the teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffaccel.distill.drawing import generate
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import frechet
from diffaccel.eval.metrics.clip_score import clip_score
from diffaccel.eval.uncertainty.intervals import paired_difference
from diffaccel.modules.weights_hash import weights_hash
from diffaccel.training.checkpoint import load_tensors, save_tensors

if TYPE_CHECKING:
    from diffaccel.distill.learning import LearningRun

FILE = "evaluation.safetensors"
_SEED = 40_000_000  # of noise: far from those of pictures that users draw


class Reader(Protocol):
    """A network that looks at pictures; one with ``texts(list) -> (n, d)`` in the same space also judges them."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Return features ``(B, d)`` of uint8 images ``(B, 3, H, W)``."""


@dataclass
class PictureEvaluation:
    """Judge the averaged generator on fixed prompts and noise, beside what the teacher draws of the same prompts.

    The teacher's pictures are drawn once, by its own pipeline and number of steps, and their features are kept in
    the run's folder.

    Args:
        pipe: the teacher's pipeline.
        prompts: one picture each.
        arguments: of the teacher's call.
        reader: network whose features are compared.
        batch: pictures of a call.
    """

    pipe: Any
    prompts: Sequence[str]
    arguments: dict[str, Any]
    reader: Reader
    batch: int = 8

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise DiffAccelError(f"An evaluation has {len(self.prompts)} prompts; a distance needs at least 2.")
        self.teacher = PipelineTeacher(self.pipe, self.prompts, min(self.batch, len(self.prompts)), self.arguments)

    def __call__(self, run: LearningRun) -> dict[str, float]:
        """Return ``fd`` and, where the reader knows texts, ``judge``, ``judge_teacher`` and their paired difference."""
        own, of_teacher = self._student(run), self._teacher(run.folder)
        values = {"fd": frechet.between(frechet.gaussian(own), frechet.gaussian(of_teacher))}
        if hasattr(self.reader, "texts"):
            texts = self.reader.texts(list(self.prompts)).cpu()
            scores, of_teachers = clip_score(own, texts), clip_score(of_teacher, texts)
            difference = paired_difference(scores, of_teachers).interval
            values |= {
                "judge": float(scores.mean()), "judge_teacher": float(of_teachers.mean()),
                "judge_less_teacher": difference.value, "judge_low": difference.low, "judge_high": difference.high,
            }  # fmt: skip
        return {name: round(value, 4) for name, value in values.items()}

    @torch.no_grad()
    def _student(self, run: LearningRun) -> Tensor:
        """Return features ``(N, d)`` of the generator's drawings."""
        teacher, features = self.teacher, []
        for group in range(teacher.groups):
            shape = (run.config.calls, teacher.batch, *teacher.shape)
            generator = torch.Generator("cpu").manual_seed(_SEED + group)
            noise = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(run.device)
            fresh = noise[1:] if run.config.fresh_noise and len(noise) > 1 else None
            with run.autocast():
                x0 = generate(teacher, run.generator, noise[0], group, run.config, fresh)
            features.append(self._features(teacher.decode(x0, group)))
        return torch.cat(features)[: len(self.prompts)]

    @torch.no_grad()
    def _teacher(self, folder: Path) -> Tensor:
        """Return features ``(N, d)`` of the teacher's pictures, read from the run's folder where they are known."""
        weights = weights_hash(self.teacher.network)
        told = {**self.teacher.identity, "weights": weights, "reader": self.reader.name, "count": len(self.prompts)}
        key, file = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest(), folder / FILE
        try:
            known, metadata = load_tensors(file)
            if metadata.get("key") == key:
                return known["teacher"]
        except (OSError, SafetensorError, KeyError, DiffAccelError):
            pass  # none there yet, or not whole: drawn again
        parts, call = [], dict(self.arguments)
        for start in range(0, len(self.prompts), self.teacher.batch):
            texts = list(self.prompts[start : start + self.teacher.batch])
            if isinstance(self.arguments.get("negative_prompt"), str):
                call["negative_prompt"] = [self.arguments["negative_prompt"]] * len(texts)
            generators = [torch.Generator("cpu").manual_seed(_SEED + start + row) for row in range(len(texts))]
            images = self.pipe(texts, generator=generators, output_type="pt", **call).images
            parts.append(self._features(images * 2 - 1))
        features = torch.cat(parts)
        save_tensors({"teacher": features}, file, {"key": key})
        return features

    def _features(self, pixels: Tensor) -> Tensor:
        """Return features of pixels in [-1, 1]."""
        if pixels.ndim != 4:
            raise DiffAccelError(f"Evaluation reads pictures (B, 3, H, W), not {tuple(pixels.shape)}. Leave it out.")
        images = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.reader(images).float().cpu()
