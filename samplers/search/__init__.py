"""Inference-time search: many samples of one prompt, steered by a reward (Kim et al., arXiv 2503.19385).

A policy is a generator for one chain of one prompt. It yields lists of :class:`~diffaccel.samplers.search.moves.Move`
and receives as many scored :class:`~diffaccel.samplers.search.particles.Particle`; the engine answers the moves of all
chains of all prompts together. What is searched, the noise levels and how much noise is fresh between them, is a
:class:`~diffaccel.samplers.search.plan.Plan`.
"""
