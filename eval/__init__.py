"""diffaccel.eval"""

if "." not in __name__:
    raise ImportError("'eval' is a folder of diffaccel: import diffaccel.eval instead")
