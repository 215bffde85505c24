"""Quantization methods: one method, one file, on formats, layers and their storage that all share."""

if "." not in __name__:
    raise ImportError("'quant' is a folder of diffaccel: import diffaccel.quant instead")

from diffaccel.quant.conv import QConv2d
from diffaccel.quant.export import export_compressed_tensors
from diffaccel.quant.hf_quantizer import register
from diffaccel.quant.linear import QLinear
from diffaccel.quant.mixdq.config import MixDQ
from diffaccel.quant.mixdq.plan_file import read_plan
from diffaccel.quant.qvgen.config import QVGen
from diffaccel.quant.qvgen.prepare import convert, prepare_qat
from diffaccel.quant.scan import ErrorScan, scan_errors
from diffaccel.quant.tib.config import TIB
from diffaccel.quant.w4a8 import W4A8
from diffaccel.quant.w4a16 import W4A16
from diffaccel.quant.w8a8 import W8A8

__all__ = [
    "TIB", "W4A8", "W4A16", "W8A8", "ErrorScan", "MixDQ", "QConv2d", "QLinear", "QVGen", "convert",
    "export_compressed_tensors", "prepare_qat", "read_plan", "scan_errors",
]  # fmt: skip

register()


def __dir__() -> list[str]:
    return sorted(__all__)
