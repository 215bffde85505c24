"""Quantization methods."""

if "." not in __name__:
    raise ImportError("'quant' is a folder of diffaccel: import diffaccel.quant instead")
