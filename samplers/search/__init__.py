"""Inference-time search: many samples of one prompt, steered by a reward (Kim et al., arXiv 2503.19385).

A policy is a generator for one chain of one prompt. It yields lists of :class:`~.particles.Move` and receives as many
scored :class:`~.particles.Particle`; the engine answers the moves of all chains of all prompts together. What is
searched, the noise levels and how much noise is fresh between them, is a :class:`~.plan.SearchPlan`.
"""
