"""What stand-ins for ``scheduler.step`` and for a network return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class StepOutput(BaseOutput):
    """The output of a scheduler's step, by attribute or by index: some loops take ``step(...)[0]``.

    Attributes:
        prev_sample: the latents after the step.
        pred_original_sample, denoised: the clean sample, as two kinds of schedulers name it.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor
    denoised: Tensor


@dataclass
class NetworkOutput(BaseOutput):
    """The output of a network, by attribute or by index: some loops take ``network(...)[0]``.

    Attributes:
        sample: the prediction; a list of tensors where the network returns one.
    """

    sample: Any
