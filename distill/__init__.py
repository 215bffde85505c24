"""Distillation methods."""

if "." not in __name__:
    raise ImportError("'distill' is a folder of diffaccel: import diffaccel.distill instead")
