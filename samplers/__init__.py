"""diffaccel.samplers"""

if "." not in __name__:
    raise ImportError("'samplers' is a folder of diffaccel: import diffaccel.samplers instead")
