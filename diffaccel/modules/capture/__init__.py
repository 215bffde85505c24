"""CUDA graphs of a pipeline's networks: what one call launches is recorded once and launched again as a whole.

``config`` is the method. A ``unit`` is one module under it: it keys its calls by what their kernels depend on
(``arguments``, ``settings``), records one graph a key (``graphs``) in memory that equal inputs share (``arenas``), and
drops its graphs as soon as anything of the module differs from when they were recorded (``state``).
"""
