"""diffaccel.kernels"""
