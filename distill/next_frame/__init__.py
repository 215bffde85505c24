"""Training of a world model that draws frame by frame (arXiv 2506.01380), and its distillation to a few steps.

``layouts`` has the situations that the sampler meets, ``attention`` what their frames see, ``forcing`` the loss of flow
matching, ``trigflow``, ``consistency`` and ``adversary`` those of distillation, ``train`` the resumable runs.
"""
