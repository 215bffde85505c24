"""Energy that a GPU has used, by the counter of NVML."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def joules(device: torch.device) -> float | None:
    """Return the energy in joules that a GPU has used since its driver was loaded.

    Of the whole card, whoever uses it. None without a GPU, without the package ``nvidia-ml-py`` (the extra ``energy``),
    and for a card without a counter. The card is found by its UUID, since NVML counts the cards that
    ``CUDA_VISIBLE_DEVICES`` hides too.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
        import torch

        index = torch.cuda.current_device() if device.index is None else device.index
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # millijoules
    except Exception:  # not installed, or a card that has no counter
        return None
