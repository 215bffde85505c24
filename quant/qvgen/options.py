"""Options of quantization-aware training, and the format of the layers that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffaccel.config import Level, Machine
from diffaccel.errors import DiffAccelError
from diffaccel.quant.base import Quantization
from diffaccel.quant.formats import LayerFormat
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.qvgen.schedule import Gate, RankSchedule

Recipe = Literal["distill", "dsa"]
Layers = Literal["body", "all"]


@dataclass(frozen=True, kw_only=True)
class TrainedQuantization(Quantization):
    """Options of training a network whose weights and activations have 2 to 8 bits.

    Args:
        weight_bits, act_bits: 2..8.
        layers: "body" keeps embedders, first and last layers by the facts of the family, and quantizes modulation as
            ``modulation`` says; "all" takes every linear of the network.
        groups: of noise levels, each with its own clipping factors of activations in every layer.
        symmetric: zeros in the middle of the codes, with the recipe "dsa" only.
        dense: store 3 bits in 3, not in 4.
        rank: of the side branch at the start; 0 trains without one (LSQ+).
        keep_rank: rank at which the decay ends; what is left stays beside the codes.
        shrink: share of the rank that each phase takes away.
        gate: how the decaying part fades in a phase, by a cosine or a line.
        phase_steps: of each phase; 0 for an equal share of all steps.
        recipe: "distill" follows the teacher; "dsa" follows it at noise and the data at clean levels.
        alpha: of "dsa": how fast the teacher's share falls.
        range_gradients: let gradients run into the least and largest number of each token, as the published code does.
        steps, batch: of training, of all processes together.
        lr: of weights, at its peak.
        scale_lr, rank_lr, clip_lr: of scales and zeros, of the side branch, and of clipping factors.
        weight_decay: of matrices of the network.
        warmup: share of the steps in which the rates rise; a cosine to 0 follows.
        max_norm: largest norm of a gradient.
        dropout: share of the steps that are made with the negative prompt, where the call has one.
        shift: moves noise levels towards noise, as models of large pictures and videos need.
        checkpointing: compute activations again backwards, to save memory.
        save_seconds, log_seconds: time between checkpoints and between entries of the log.
    """

    weight_bits: int = 4
    act_bits: int = 4
    layers: Layers = "body"
    groups: int = 50
    symmetric: bool = False
    dense: bool = False
    rank: int = 32
    keep_rank: int = 0
    shrink: float = 0.5
    gate: Gate = "cosine"
    phase_steps: int = 0
    recipe: Recipe = "distill"
    alpha: float = 5.0
    range_gradients: bool = False
    steps: int = 2000
    batch: int = 16
    lr: float = 3e-5
    scale_lr: float = 3e-5
    rank_lr: float = 3e-5
    clip_lr: float = 1e-2
    weight_decay: float = 1e-4
    warmup: float = 0.1
    max_norm: float = 1.0
    dropout: float = 0.05
    shift: float = 1.0
    checkpointing: bool = False
    save_seconds: float = 60.0
    log_seconds: float = 5.0

    def validate(self) -> None:
        super().validate()
        name = type(self).__name__
        for option in ("weight_bits", "act_bits"):
            if not 2 <= getattr(self, option) <= 8:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be 2 to 8.")
        least = {"groups": 1, "rank": 0, "keep_rank": 0, "phase_steps": 0, "steps": 1, "batch": 1}
        positive = ("lr", "scale_lr", "rank_lr", "clip_lr", "max_norm", "shift", "alpha")
        for option, bound in {**least, "save_seconds": 0, "log_seconds": 0, "weight_decay": 0}.items():
            if getattr(self, option) < bound:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be at least {bound}.")
        for option in positive:
            if not getattr(self, option) > 0:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be above 0.")
        for option in ("warmup", "dropout"):
            if not 0 <= getattr(self, option) < 1:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be in [0, 1).")
        if self.symmetric and self.recipe != "dsa":
            raise DiffAccelError(
                f"{name}.symmetric is True with recipe='distill', which is reported to cost 2.9 points of VBench at 4 "
                "bits of Wan-1.3B. Leave it False (products with zeros are as exact), or take recipe='dsa'."
            )
        if self.recipe != "dsa" and self.alpha != 5.0:
            raise DiffAccelError(f"{name}.alpha is {self.alpha}, which has no effect with recipe='distill'.")
        self._check_rank()

    def _check_rank(self) -> None:
        name = type(self).__name__
        if not 0 < self.shrink < 1:
            raise DiffAccelError(f"{name}.shrink is {self.shrink}; it must be inside of (0, 1).")
        if self.keep_rank > self.rank:
            raise DiffAccelError(
                f"{name}.keep_rank is {self.keep_rank}, but the side branch starts with rank {self.rank}. Keep that "
                "much or less."
            )
        plain = {"phase_steps": 0, "shrink": 0.5, "gate": "cosine"}
        for option, value in plain.items() if self.keep_rank == self.rank else ():
            if getattr(self, option) != value:
                raise DiffAccelError(
                    f"{name}.{option} is {getattr(self, option)!r}, which has no effect: a rank of {self.rank} of "
                    f"which {self.keep_rank} stay does not fall. Leave it at {value!r}, or keep less of the rank."
                )
        phases = self.schedule.phases
        if self.rank and self.steps < max(phases, 1) * max(self.phase_steps, 1):
            raise DiffAccelError(
                f"{name}.steps is {self.steps}, but rank {self.rank} vanishes in {phases} phases"
                + (f" of {self.phase_steps} steps" if self.phase_steps else "")
                + ". Take more steps or a smaller rank."
            )

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return which tensor cores multiply the codes."""
        level, why = super().support(machine)
        if level != "fast":
            return level, why
        is_hopper = (9, 0) <= (machine.capability or (0, 0)) < (10, 0)
        return level, "4-bit codes by float8 tensor cores" if is_hopper else "4-bit codes by int8 tensor cores"

    @property
    def schedule(self) -> RankSchedule:
        """How the rank of the side branch falls."""
        first = RankSchedule(self.rank, self.keep_rank, self.shrink, self.gate, 1)
        steps = self.phase_steps or max(1, self.steps // max(1, first.phases))
        return RankSchedule(self.rank, self.keep_rank, self.shrink, self.gate, steps)

    @property
    def all_linears(self) -> bool:
        return self.layers == "all"

    def linear_format(self) -> LayerFormat:
        """Return the format without training: one group of noise levels, and the rank that is kept."""
        return LowBit(
            weight_bits=self.weight_bits, act_bits=self.act_bits, symmetric=self.symmetric, rank=self.keep_rank,
            dense=self.dense,
        )  # fmt: skip

    def read_format(self, text: str) -> LayerFormat:
        return LowBit.read(text)

    def run_options(self) -> dict[str, Any]:
        """Return what a run must have in common with its checkpoint."""
        return {key: value for key, value in self.to_dict().items() if key not in ("save_seconds", "log_seconds")}
