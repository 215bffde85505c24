"""One step's noise, noise levels and conditions, and the teacher as quantization-aware training sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from diffaccel.quant.qvgen.data import CleanSamples
from diffaccel.quant.qvgen.options import TrainedQuantization

Branch = Literal["positive", "negative"]


class FollowedModel(Protocol):
    """A full-precision network, and how it and copies of it are asked at any noise level.

    ``diffaccel.distill.PipelineTeacher`` and ``NetworkTeacher`` are such.

    Attributes:
        network: the trained network.
        kind: type of its output.
        shape: of a sample.
        guidance: of its call; above 1, there are negative conditions.
    """

    network: nn.Module
    kind: Any
    shape: tuple[int, ...]
    guidance: float

    @property
    def groups(self) -> int:
        """Number of batches of conditions."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with its checkpoint, beside the weights; JSON-ready."""

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``a`` and ``s`` of the network's input ``a x0 + s eps`` at levels ``(B,)`` of the linear path."""

    def ask(self, network: nn.Module, x: Tensor, sigma: Tensor, group: int, branch: Branch = "positive") -> Tensor:
        """Return the raw output of a network at ``x``, under the conditions of a group."""


@dataclass(frozen=True)
class NoisyBatch:
    """What one step is made of.

    Attributes:
        x0, eps: ``(B, ...)``.
        sigma: ``(B,)`` levels of the linear path, on the CPU.
        group: the conditions.
        branch: which of them.
    """

    x0: Tensor
    eps: Tensor
    sigma: Tensor
    group: int
    branch: Branch

    @classmethod
    def new(
        cls,
        model: FollowedModel,
        samples: CleanSamples,
        config: TrainedQuantization,
        generator: torch.Generator,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
    ) -> NoisyBatch:
        """Draw on the CPU for all processes, so that the numbers of one sample depend on no other, and keep a share.

        Levels are uniform, and moved by ``shift sigma / (1 + (shift - 1) sigma)``.

        Args:
            share: number of this process and of all of them.
        """
        rank, size = share
        count = config.batch // size
        rows = slice(rank * count, (rank + 1) * count)
        kind: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
        eps = torch.randn(config.batch, *model.shape, **kind)[rows]
        sigma = torch.rand(config.batch, **kind)[rows]
        chance = float(torch.rand((), **kind))
        groups = -(-len(samples.prompts) // count)
        number = int(torch.randint(-(-groups // size), (1,), generator=generator, device="cpu")) * size + rank
        sigma = (config.shift * sigma / (1 + (config.shift - 1) * sigma)).clamp(1e-3, 1 - 1e-3)
        branch: Branch = "negative" if chance < config.dropout and model.guidance > 1 else "positive"
        return cls(samples.rows(number, count).to(device), eps.to(device), sigma, number, branch)
