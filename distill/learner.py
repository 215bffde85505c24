"""A network that learns, as a copy of the teacher, and the networks of which there is none."""

from __future__ import annotations

import copy

import torch
from torch import nn

from diffaccel.errors import DiffAccelError


def learner(network: nn.Module) -> nn.Module:
    """Return a copy in float32 whose weights learn; without dropout.

    Raises:
        DiffAccelError: for quantized weights, which have no gradient, and for a network with adapters, whose copies
            would be saved under names that no plain network has.
    """
    name = type(network).__name__
    integers = [key for key, p in network.named_parameters() if not p.dtype.is_floating_point or p.element_size() < 2]
    if integers:
        raise DiffAccelError(
            f"{name} has quantized weights ({integers[0]} and {len(integers) - 1} more), which cannot learn. Distil "
            "the pipeline before it is quantized, and quantize the student."
        )
    adapters = [key for key, _ in network.named_parameters() if "lora_" in key or ".base_layer." in key]
    if adapters:
        raise DiffAccelError(
            f"{name} has LoRA adapters ({adapters[0]}), which a student does not keep apart. Fuse them first: "
            "pipe.fuse_lora(), then pipe.unload_lora_weights()."
        )
    return copy.deepcopy(network).float().eval().requires_grad_(True)


def compute_dtype(network: nn.Module, asked: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a run's arithmetic: the one asked for, or that of the teacher's weights.

    Raises:
        DiffAccelError: for float32 asked of a teacher with weights of 16 bits.
    """
    half = next((p.dtype for p in network.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if asked is None:
        return half or torch.float32
    if asked == torch.float32 and half is not None:
        raise DiffAccelError(
            f"dtype is float32, but the teacher's weights are {str(half).removeprefix('torch.')}. Leave dtype out, or "
            "load the pipeline in float32."
        )
    return asked
