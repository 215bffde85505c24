"""Inference-time search: many samples of one prompt, steered by a reward (Kim et al., arXiv 2503.19385).

A policy is a generator that runs one chain of one prompt. It yields lists of :class:`~.particles.Transition` and
receives one scored :class:`~.particles.Particle` for each; the engine answers the transitions of all chains of all
prompts together. A :class:`~.plan.SearchPlan` says which noise levels are searched and how much of the noise is fresh
between two of them.
"""
