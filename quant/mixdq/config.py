"""MixDQ: metric-decoupled mixed precision by a plan that was made for one model."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn

from diffaccel import families
from diffaccel.config import Handle
from diffaccel.errors import DiffAccelError
from diffaccel.quant.base import Quantization
from diffaccel.quant.formats import LEAST_GROUP, Clip, LayerFormat
from diffaccel.quant.mixdq.candidates import Layers
from diffaccel.quant.mixdq.plan_file import PlannedLayer, PrecisionPlan, mixed_format, read_plan
from diffaccel.quant.mixed.conv import MixedConv2d
from diffaccel.quant.mixed.form import InputRange, InputScale, MixedFormat, read_format
from diffaccel.quant.mixed.linear import MixedLinear
from diffaccel.quant.options import Convolutions, Modulation

logger = logging.getLogger(__name__)
Allocation = Literal["decoupled", "sqnr", "uniform"]
FirstRow = Literal["auto", "off"]
Calibration = Literal["minmax", "ema"]


@dataclass(frozen=True, kw_only=True)
class MixDQ(Quantization):
    """Mixed precision: each layer has 2, 4 or 8 bits a weight, by what the picture loses where it alone has them.

    ``diffaccel quantize --method mixdq`` makes the plan: it calibrates ranges, measures each layer alone (SSIM of
    pictures for content layers, SQNR of the network's output for the others) and solves an integer program for the
    average. Our default: activations scaled by token, groups of weights, scales of least squared error, first and last
    layers left alone. :meth:`paper` is as published.

    Of the options that all quantizers have: ``modulation`` "int4" lets linears that run once a sample have 4 or 8 bits,
    "int8" 8, and "keep" leaves them; ``convs`` "int8" plans weights and inputs of convolutions, "weights" their weights
    alone, "keep" nothing.

    Args:
        plan: file of the plan; without one nothing can be applied.
        weight_bits: average bits of the planned weights, 2 to 8.
        activation_bits: of inputs: 4 to 8 on average, or 16 to leave them as they are.
        allocation: "decoupled" by both metrics, "sqnr" by the output's error alone, "uniform" the same bits everywhere
            (2, 4 or 8; where the average lies between, the first layers have more).
        activation_scale: by "token" (or picture) at each call, or one calibrated scale for each "tensor".
        bos: "auto" stores the output of a constant first text row, where there is one; "off" does not look for it.
        protect: share of the inputs that stay as they are, the most sensitive of each group.
        within_average: count these 16 bits into the average of the activations, and let the others have fewer.
        planned: "facts" plans what other quantizers quantize, "all" every linear and convolution.
        group_size: weights below 8 bits that share a multiple of the row's scale; 0 for whole rows.
        scales: of weights: least squared error ("mse") or largest magnitude ("none").
        calibration: exact "minmax" of inputs, or their running mean with momentum 0.95 ("ema").
        samples: prompts of the calibration.
        probes: prompts that each layer's sensitivity is measured on.
        steps: of these drawings.
        window: pixels of a side of SSIM's window, at most the picture's.
        ratios: number of ratios of the groups' averages that are tried.
        averages: number of averages that are tried, from 0.3 bits below the target.
        latency: share of the span from the fastest plan's time to the slowest's that products may take, measured on
            this device; it replaces bits as the cost of weights. 0 for bits.
        exact: solve the program by scipy (HiGHS) instead of by slopes and swaps; needs scipy.
        seed: of all drawings.
    """

    name: ClassVar[str] = "mixdq"
    citation: ClassVar[str] = "MixDQ, arXiv 2405.17873"
    worker: ClassVar[str] = "diffaccel.quant.mixdq.work:make"

    modulation: Modulation = "int4"
    convs: Convolutions = "int8"
    plan: str = ""
    weight_bits: float = 5.0
    activation_bits: float = 8.0
    allocation: Allocation = "decoupled"
    activation_scale: InputScale = "token"
    bos: FirstRow = "auto"
    protect: float = 0.01
    within_average: bool = False
    planned: Layers = "facts"
    group_size: int = 64
    scales: Clip = "mse"
    calibration: Calibration = "minmax"
    samples: int = 32
    probes: int = 8
    steps: int = 4
    window: int = 511
    ratios: int = 5
    averages: int = 1
    latency: float = 0.0
    exact: bool = False
    seed: int = 0

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the published form: static per-tensor activations, whole rows by min-max, 1 % protected."""
        published: dict[str, Any] = {
            "weight_bits": 8.0, "activation_scale": "tensor", "within_average": True, "planned": "all", "group_size": 0,
            "scales": "none", "calibration": "ema", "probes": 32, "steps": 1, "ratios": 10, "averages": 10,
        }  # fmt: skip
        return cls(**{**published, **changes})

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether a pipeline has one network to plan."""
        fits, why = super().fits(pipeline, family)
        return (fits, f"{why}, by a plan (diffaccel quantize --method mixdq)") if fits else (fits, why)

    def validate(self) -> None:
        super().validate()
        for name, low, high in (
            ("weight_bits", 2, 8), ("protect", 0, 1), ("latency", 0, 1), ("samples", 2, math.inf),
            *((name, 1, math.inf) for name in ("probes", "steps", "window")),
            ("ratios", 1, 1000), ("averages", 1, 1000),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                span = f"from {low} to {high}" if math.isfinite(high) else f"{low} or more"
                raise DiffAccelError(f"MixDQ.{name} is {value}; it must be {span}.")
        if not (4 <= self.activation_bits <= 8 or self.activation_bits == 16):
            raise DiffAccelError(
                f"MixDQ.activation_bits is {self.activation_bits}; it must be from 4 to 8, or 16 to leave activations."
            )
        if self.group_size and (self.group_size < LEAST_GROUP or self.group_size % 2):
            raise DiffAccelError(
                f"MixDQ.group_size is {self.group_size}; it must be even and {LEAST_GROUP} or more, or 0 for rows."
            )
        if not -(2**62) <= self.seed <= 2**62:
            raise DiffAccelError(f"MixDQ.seed is {self.seed}; it must be from -2**62 to 2**62.")
        if self.samples < self.probes:
            raise DiffAccelError(
                f"MixDQ.probes is {self.probes}, more than samples, {self.samples}. Layers are probed on the first "
                "samples; take as many, or fewer."
            )
        self._check_uses()

    def _check_uses(self) -> None:
        """Raise for options that contradict each other, or that have no effect beside the others."""
        for name in ("latency", "exact") if self.allocation == "uniform" else ():
            if value := getattr(self, name):
                raise DiffAccelError(
                    f"MixDQ.{name} is {value} with allocation='uniform', which solves no program. Leave it out, or "
                    "take allocation='decoupled' or 'sqnr'."
                )
        if self.calibration == "ema" and self.activation_scale == "token":
            raise DiffAccelError(
                "MixDQ.calibration is 'ema' with activation_scale='token', which takes ranges at each call and none of "
                "the calibration. Leave it at 'minmax', or take activation_scale='tensor'."
            )
        if self.allocation == "uniform" or self.activation_bits == 16 or not self.protect:
            return
        if self.protect == 1:
            raise DiffAccelError(
                f"MixDQ.protect is 1 with activation_bits={self.activation_bits}: all inputs stay as they are. Say "
                "so by activation_bits=16, or protect less."
            )
        if self.within_average and self.activation_bits == 4:
            raise DiffAccelError(
                f"MixDQ.within_average is True with activation_bits=4 and protect={self.protect}: with the protected "
                "ones at 16 bits the others would need less than 4, which no input has. Allow more than 4, or "
                "protect=0."
            )

    def apply(self, pipe: Any) -> Handle:
        """Put a plan on the network of a pipeline.

        Raises:
            DiffAccelError: without a plan, for one of another model, and for a pipeline with two networks.
        """
        if len(networks := families.networks(pipe)) > 1:
            raise DiffAccelError(
                f"'mixdq' plans one network, and {type(pipe).__name__} has {len(networks)}. Use w8a8, w4a16 or w4a8."
            )
        plan, scheduler = self.read(), type(getattr(pipe, "scheduler", None)).__name__
        made_with = plan.provenance.get("scheduler", scheduler)
        if made_with != scheduler and any(layer.low for layer in plan.layers.values()):
            logger.warning(
                f"The plan '{self.plan}' was calibrated with {made_with}, and this pipeline has {scheduler}: its "
                "ranges may not fit. Make the plan with the scheduler that is used, or with activation_scale='token'."
            )
        return super().apply(pipe)

    def linear_format(self) -> LayerFormat:
        """Return the format that a layer without a plan would have, of which there is none."""
        raise self._no_plan()

    def planned_formats(self, network: nn.Module) -> dict[str, LayerFormat] | None:
        """Return the formats of the layers that the plan names, without those that ``skip`` names."""
        plan = self.read()
        plan.check(network)
        formats: dict[str, LayerFormat] = {}
        for name, layer in plan.layers.items():
            if not self.skips(name):
                formats[name] = self.format_of(layer, network.get_submodule(_below_adapter(network, name)))
        return formats

    def read_format(self, text: str) -> LayerFormat:
        return read_format(text)

    def layer(self, name: str, module: nn.Module, form: LayerFormat) -> nn.Module | None:
        """Return the quantized layer for a planned one, with the plan's ranges."""
        plan = self.read()
        planned = plan.layers[name]
        known = InputRange(planned.low, planned.high, plan.first_row if planned.first_row else None)
        clip = plan.settings.get("scales", self.scales)
        cls: Any = MixedLinear if isinstance(module, nn.Linear) else MixedConv2d
        return cls.of(module, form, known, clip)

    def format_of(self, layer: PlannedLayer, module: Any) -> MixedFormat:
        """Return the format of a planned layer; the plan's settings count where they differ from this config's."""
        settings = self.read().settings if self.plan else {}
        return mixed_format(
            layer, module, settings.get("activation_scale", self.activation_scale),
            settings.get("group_size", self.group_size),
        )  # fmt: skip

    def read(self) -> PrecisionPlan:
        """Return the plan, which is read once."""
        if not self.plan:
            raise self._no_plan()
        if "_plan" not in vars(self):
            object.__setattr__(self, "_plan", read_plan(self.plan))
        return self._plan  # type: ignore[attr-defined]

    def _no_plan(self) -> DiffAccelError:
        return DiffAccelError(
            "'mixdq' needs the plan of this model: MixDQ(plan='plan.json'). Make one with: diffaccel quantize MODEL "
            "--method mixdq --out DIR."
        )


def _below_adapter(network: nn.Module, name: str) -> str:
    """Return the name of a layer's module, below an adapter where it has one."""
    module: Any = network.get_submodule(name)
    return f"{name}.base_layer" if isinstance(getattr(module, "base_layer", None), nn.Module) else name
