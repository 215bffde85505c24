"""Codes of 8 bits: their names, the largest of each, and the least magnitude that a scale is made of."""

from __future__ import annotations

from typing import Literal

import torch

Codes = Literal["int8", "fp8"]
LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SMALLEST = 1e-12
LEAST_SCALE = 1e-9  # of codes with zeros
