"""Step caches: at some steps the blocks of a network do not run, and a forecast stands in for what they would compute.

A decision (``decisions``, ``indicators``) says which steps are real; a forecast (``forecasts``) is a weighted sum of
what the blocks computed at earlier real steps. Any two go together. ``cache`` keeps the state, apart for each guidance
branch and chunk of rows, and ``block_stack`` puts both on a network.
"""
