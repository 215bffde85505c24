"""What a plan is made on: prompts drawn by the pipeline's own call, and the calls of its network while it draws."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from diffaccel.errors import DiffAccelError

BATCH = 8


@dataclass(frozen=True)
class Drawings:
    """Prompts, and how they are drawn; picture i depends on prompt i and ``seed + i``.

    Args:
        arguments: of the pipeline's call, without prompts, generators and kind of output.
    """

    prompts: tuple[str, ...]
    steps: int
    seed: int
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the pictures beside the model, JSON-ready."""
        told = {k: v for k, v in self.arguments.items() if isinstance(v, str | int | float | bool | None | list)}
        digest = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]
        return {"prompts": len(self.prompts), "digest": digest, "steps": self.steps, "seed": self.seed, "call": told}

    @torch.no_grad()
    def draw(self, pipe: Any, count: int | None = None) -> Tensor:
        """Return the first pictures, uint8 ``(B, 3, H, W)`` on the CPU; frames of videos one after another."""
        pictures = []
        texts = self.prompts if count is None else self.prompts[:count]
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            generators = [torch.Generator("cpu").manual_seed(self.seed + start + i) for i in range(len(batch))]
            arguments = dict(self.arguments)
            if isinstance(arguments.get("negative_prompt"), str):
                arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(batch)
            result = pipe(
                prompt=batch, num_inference_steps=self.steps, generator=generators, output_type="pt", **arguments
            )
            images = getattr(result, "images", None)
            frames = result.frames if images is None else images
            pictures.append((frames.float().flatten(0, -4).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(pictures)


@dataclass
class RecordedCalls:
    """Calls of a network, with what it returned."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=list)

    @contextlib.contextmanager
    def recording(self, network: nn.Module) -> Iterator[None]:
        """Record the calls that are made in the block."""

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.calls.append((_copied(args), _copied(kwargs), first_tensor(output).clone()))

        hook = network.register_forward_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def noise_ratio(self, network: nn.Module) -> float:
        """Return ``10 log10(sum y^2 / sum (y - y')^2)`` in dB of a network's outputs y' now; 200 where they are equal.

        Raises:
            DiffAccelError: where no call was recorded.
        """
        if not self.calls:
            raise DiffAccelError("The pipeline's call made no call of its network: there is nothing to measure.")
        signal, noise = 0.0, 0.0
        for args, kwargs, output in self.calls:
            other = first_tensor(network(*_copied(args), **_copied(kwargs)))
            signal += float(output.double().square().sum())
            noise += float((other.double() - output.double()).square().sum())
        if noise == 0:
            return MOST_DECIBELS
        return min(MOST_DECIBELS, max(-MOST_DECIBELS, 10 * _log10(signal) - 10 * _log10(noise)))


MOST_DECIBELS = 200.0  # an infinity is no number of a program


def _log10(value: float) -> float:
    return float(torch.tensor(max(value, 1e-300), dtype=torch.float64, device="cpu").log10())


def first_tensor(output: Any) -> Tensor:
    """Return the tensor that a network returns, alone, in a tuple or in one of diffusers' outputs."""
    return output if isinstance(output, Tensor) else first_tensor(output[0])


def _copied(arguments: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, arguments)
